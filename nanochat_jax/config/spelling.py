"""Names for settings that are not known: those they stand for, or are misspelt from."""

import difflib
from collections.abc import Iterable

OTHER_NAMES = {
    "adam_betas": "betas adamw_betas",
    "batch_size": "batch bs micro_batch_size device_batch_size train_batch_size "
    "per_device_train_batch_size",
    "checkpoint": "ckpt model_path model_dir load",
    "checkpoint_dir": "out out_dir output_dir save_dir output checkpoint save",
    "checkpoint_interval": "save_interval save_every save_steps checkpoint_every",
    "compute_dtype": "dtype precision bf16 fp16 amp mixed_precision",
    "config_file": "config cfg c conf",
    "data_path": "data data_dir dataset_path train_file train_data",
    "device": "gpu cpu cuda",
    "dim": "n_embd d_model hidden_size embed_dim model_dim width n_embed",
    "epochs": "num_epochs num_train_epochs",
    "eval_interval": "eval_every eval_steps",
    "fallback_lr": "adam_lr adamw_lr embed_lr embedding_lr",
    "ffn_mult": "mlp_ratio mlp_mult",
    "galore_rank": "rank galore_r lora_rank",
    "galore_update_freq": "update_proj_gap proj_gap galore_gap refresh_every",
    "grad_accum_steps": "accum grad_accum gradient_accumulation_steps accumulate "
    "accumulation_steps",
    "grad_clip": "clip clip_norm max_grad_norm clip_grad_norm gradient_clip",
    "log_interval": "log_every logging_steps",
    "lr": "learning_rate learn_rate learningrate rate muon_lr matrix_lr",
    "max_seq_len": "max_position_embeddings context_window n_ctx",
    "max_tokens": "max_new_tokens num_tokens n_tokens max_length length tokens",
    "mesh": "devices gpus num_gpus n_gpus num_devices fsdp tensor",
    "muon_momentum": "momentum beta mu",
    "n_heads": "n_head heads num_heads num_attention_heads",
    "n_kv_heads": "num_key_value_heads kv_heads n_kv_head",
    "n_layers": "n_layer layers num_layers num_hidden_layers",
    "ns_steps": "ns_iters newton_schulz_steps",
    "output": "out out_dir output_dir o",
    "quant_bits": "bits num_bits",
    "remat": "gradient_checkpointing checkpointing recompute",
    "resume": "resume_from resume_from_checkpoint restore",
    "rope_theta": "rope_base",
    "schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type",
    "seed": "random_seed rng_seed",
    "seq_len": "block_size context_length context ctx sequence_length seq_length "
    "seqlen sequence_len",
    "steps": "total_steps max_steps num_steps",
    "temperature": "temp t",
    "text": "data data_path input",
    "total_steps": "steps max_steps num_steps train_steps iters max_iters iterations "
    "num_iterations n_steps total_iters",
    "use_8bit_optim": "8bit use_8bit int8 bit8 load_in_8bit optim_8bit",
    "use_galore": "galore",
    "wandb": "wandb_project",
    "warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps",
    "weight_decay": "wd decay weightdecay",
    "weight_tied": "tie_embeddings tie_weights tie_word_embeddings tied tying",
}
"""Names that a setting has in other programs."""

_SURE, _LIKELY, _MOST = 0.8, 0.6, 3


def meant(name: str, known: Iterable[str]) -> list[str]:
    """Returns the known names that another one most likely stands for.

    Example:
      >>> meant("learning_rate", ["lr", "seed"])
      ['lr']

    Args:
      name: Name that is not known, with underscores.
      known: Names to choose from.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=_SURE)
    others = [key for key in known if name in OTHER_NAMES.get(key, "").split()]
    parts = set(name.split("_"))
    within = [key for key in known if parts <= set(key.split("_"))]
    found = close or others or within
    if found and len(found) <= _MOST:
        return found
    return difflib.get_close_matches(name, known, n=1, cutoff=_LIKELY)


def question(names: Iterable[str]) -> str:
    """Returns the question whether one of some names was meant, or nothing.

    Example:
      >>> question(["--lr"])
      'Did you mean `--lr`?'

    Args:
      names: Names as they are written.
    """
    quoted = " or ".join(f"`{name}`" for name in names)
    return f"Did you mean {quoted}?" if quoted else ""
