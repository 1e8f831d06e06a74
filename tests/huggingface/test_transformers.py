"""Models of transformers and ours are one function of the same folder, both ways."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.data import bpe, load_tokenizer
from nanochat_jax.lm.model import generate, gpt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

VOCAB, LENGTH, NEW, CLOSE = 300, 80, 32, 3e-5
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 172,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# Architectures and shapes, as they are published but narrow.
GQA, EPS = {"num_key_value_heads": 2}, {"rms_norm_eps": 1e-5}
SMOLLM2 = {
    "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 8, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}  # fmt: skip
THEIRS = {
    "qwen3-tied-gqa": ("Qwen3", {**GQA, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {}),
    "qwen3-wide-heads": ("Qwen3", {**GQA, "head_dim": 24}),
    "llama2": ("Llama", EPS),
    "llama-gqa": ("Llama", {**EPS, "num_key_value_heads": 1}),
    "llama3": ("Llama", {**GQA, **EPS, "rope_parameters": LLAMA3}),
    "smollm2": ("Llama", {**EPS, **SMOLLM2}),
    "mistral": ("Mistral", {**GQA, **EPS, "sliding_window": None}),
}
BASE = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=128
)
OURS = {
    "tied": {},
    "untied": {"weight_tied": False},
    "padded-stacked": {"weight_tied": False, "pad_vocab_to": 128, "scan_layers": True},
    "gain-wide-heads": {"qk_norm": "gain", "head_dim": 24},
    "llama3": {
        "qk_norm": "none",
        "norm_eps": 1e-5,
        "rope_scaling": (8.0, 1.0, 4.0, 32),
    },
}


def ids(rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length))


@functools.cache
def theirs(name):
    """A random model of transformers, whose logits have a deviation of about one."""
    kind, values = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **values})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, x in model.named_parameters():
            if "norm" in path:
                x.uniform_(0.5, 1.5)
            else:
                x.normal_(0, x.shape[-1] ** -0.5)
    return model


@functools.cache
def ours(name):
    """A random model of ours, likewise."""
    config = dataclasses.replace(BASE, **OURS[name])
    graphdef, params = gpt.init(config, 0)
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        fan_in = x.shape[-1] if "embed" in name else x.shape[-2]
        return (rng.standard_normal(x.shape) * fan_in**-0.5).astype(np.float32)

    return config, graphdef, jax.tree.map_with_path(draw, params)


def logits_there(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def greedy_there(model, prompt):
    out = model.generate(
        torch.from_numpy(prompt[None]), max_new_tokens=NEW, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def greedy_here(graphdef, params, config, prompt):
    return list(generate(
        graphdef, params, config, prompt.tolist(), max_tokens=NEW, temperature=0.0
    ))  # fmt: skip


def check_equal(model, graphdef, params, config):
    expected = logits_there(model, ids())
    found = np.asarray(jax.jit(functools.partial(gpt.apply, graphdef))(params, ids()))
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(found, expected, atol=CLOSE, rtol=0)
    prompt = ids(1, 8)[0]
    assert greedy_here(graphdef, params, config, prompt) == greedy_there(model, prompt)


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_is_read(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    params = huggingface.read_weights(tmp_path, config)
    check_equal(model, gpt.abstract_model(config)[0], params, config)


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_is_read_by_transformers(name, tmp_path):
    config, graphdef, params = ours(name)
    folder = tmp_path / "out"
    huggingface.write_folder(
        folder, config, params, tokenizer=None, max_part_bytes=100_000
    )
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    check_equal(model.eval(), graphdef, params, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_model_that_went_in_and_out_is_equal_to_the_bit(name, dtype, tmp_path):
    model = theirs(name)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "a")
    model.to(torch.float32)
    config = huggingface.read_config(tmp_path / "a")
    params = huggingface.read_weights(tmp_path / "a", config)
    huggingface.write_folder(
        tmp_path / "b", config, params, tokenizer=None, dtype=dtype
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, after = (load(tmp_path / x).state_dict() for x in "ab")
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert x.dtype == after[key].dtype and torch.equal(x, after[key]), key
    theirs.cache_clear()


TEXTS = ["The cat sat\n\n  on 12345 mats.", "naïve 猫 \0 Ā <0x00>", "if x:\n\treturn 1"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("qk_norm", ["unit", "none"])
def test_tokenizer_ids_are_equal(kind, qk_norm, tmp_path):
    file = None
    if kind == "bpe":
        file = tmp_path / "tokenizer.json"
        file.write_text(bpe.train(TEXTS * 20, VOCAB), encoding="utf-8")
    config = dataclasses.replace(BASE, qk_norm=qk_norm)
    params = gpt.init(config, 0)[1]
    huggingface.write_folder(tmp_path / "out", config, params, tokenizer=file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    used = load_tokenizer(file)
    for text in TEXTS:
        expected = used.encode(text).tolist()
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.eos_token_id == (None if kind == "bytes" else used.separator)
    assert huggingface.tokenizer_path(tmp_path / "out").is_file()
