"""Folders of transformers: read as they were written, or refused by name."""

import dataclasses
import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.checkpoints import weights_file
from nanochat_jax.lm.data import load_tokenizer
from nanochat_jax.lm.model import gpt

QWEN3 = ModelConfig(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=12, qk_norm="gain",
    ffn_mult=2.0, vocab_size=260, max_seq_len=32, weight_tied=False,
)  # fmt: skip
VARIANTS = {
    "qwen3": {},
    "tied": {"weight_tied": True},
    "unit": {"qk_norm": "unit"},
    "llama3": {"qk_norm": "none", "rope_scaling": (8.0, 1.0, 4.0, 16.0)},
    "llama": {"qk_norm": "none", "norm_eps": 1e-5, "rope_theta": 5e5},
    "stacked-padded": {"scan_layers": True, "pad_vocab_to": 128},
    "bfloat16": {"param_dtype": "bfloat16"},
}
AS_STORED = {"scan_layers": False, "pad_vocab_to": 1, "param_dtype": "float32"}


@functools.cache
def model(name="qwen3"):
    """A model with noise on all parameters, its padding too."""
    config = dataclasses.replace(QWEN3, **VARIANTS[name])
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    return config, jax.tree.map(noise, gpt.abstract_model(config)[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A Qwen3 in parts."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    config, params = model()
    huggingface.write_folder(
        folder, config, params, tokenizer=None, max_part_bytes=10_000
    )
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def change(path, **values):
    """Sets keys of a JSON file; deletes those given as `...`."""
    content = json.loads(path.read_text()) | values
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept))


def tensors_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    loaded = [safetensors.numpy.load_file(file) for file in files]
    return {name: x for part in loaded for name, x in part.items()}


# Round trips


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "unit"])
def test_what_is_written_is_read_to_the_bit(name, tmp_path):
    config, params = model(name)
    huggingface.write_folder(tmp_path / "out", config, params, tokenizer=None)
    found = huggingface.read_config(tmp_path / "out")
    assert found == dataclasses.replace(config, **AS_STORED)
    read = huggingface.read_weights(tmp_path / "out", config)
    chex.assert_trees_all_equal_shapes_and_dtypes(read, params)
    cut = functools.partial(gpt.without_padding, config)
    chex.assert_trees_all_equal(cut(read), cut(params))


def test_stacked_padded_and_plain_models_make_equal_tensors(tmp_path):
    config, params = model("stacked-padded")
    huggingface.write_folder(tmp_path / "a", config, params, tokenizer=None)
    plain = huggingface.read_config(tmp_path / "a")
    read = huggingface.read_weights(tmp_path / "a", plain)
    huggingface.write_folder(tmp_path / "b", plain, read, tokenizer=None)
    chex.assert_trees_all_equal(*(tensors_of(tmp_path / x) for x in "ab"))


def test_gains_of_a_model_without_are_ones(tmp_path):
    config, params = model("unit")
    huggingface.write_folder(tmp_path / "out", config, params, tokenizer=None)
    found = huggingface.read_config(tmp_path / "out")
    assert found.qk_norm == "gain"
    read = huggingface.read_weights(tmp_path / "out", found)
    for norm in ("query_norm", "key_norm"):
        gain = read["blocks"][1]["attention"].pop(norm)["scale"]
        read["blocks"][0]["attention"].pop(norm)
        np.testing.assert_array_equal(gain, np.ones(12))
    chex.assert_trees_all_equal(read, params)


def test_bfloat16_files_are_exact_in_float32_and_back(tmp_path):
    config, params = model("bfloat16")
    huggingface.write_folder(tmp_path / "a", config, params, tokenizer=None)
    longer = huggingface.read_config(tmp_path / "a")
    read = huggingface.read_weights(tmp_path / "a", longer)
    huggingface.write_folder(
        tmp_path / "b", longer, read, tokenizer=None, dtype="bfloat16"
    )
    found = tensors_of(tmp_path / "b")
    chex.assert_trees_all_equal(tensors_of(tmp_path / "a"), found)
    assert {x.dtype.name for x in found.values()} == {"bfloat16"}


def test_parameters_are_put_one_by_one_and_contiguous(written):
    config = dataclasses.replace(QWEN3, scan_layers=True)
    like = jax.tree.leaves_with_path(gpt.abstract_model(config)[1])
    put = []

    def keep(path, x):
        assert x.flags.c_contiguous
        put.append((path, x.shape))
        return x

    huggingface.read_weights(written, config, put=keep)
    assert put == [(path, x.shape) for path, x in like]


def test_names_settings_and_parts_are_those_of_transformers(written):
    index = json.loads((written / "model.safetensors.index.json").read_text())
    tensors = tensors_of(written)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (24, 16)
    assert tensors["model.layers.0.self_attn.q_norm.weight"].shape == (12,)
    assert tensors["lm_head.weight"].shape == (260, 16)
    config = json.loads((written / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (config["head_dim"], config["num_key_value_heads"]) == (12, 1)
    assert config["rope_parameters"]["rope_theta"] == 10_000
    assert config["dtype"] == "float32" and config["tie_word_embeddings"] is False


@pytest.mark.parametrize("order", ["columns", "reversed"])
def test_arrays_of_any_layout_are_written_by_their_values(order, tmp_path):
    config, params = model()
    change_layout = {
        "columns": np.asfortranarray,
        "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    }[order]
    turned = jax.tree.map(lambda x: change_layout(np.asarray(x)), params)
    weights_file.save(tmp_path / "w.safetensors", config, turned, step=0, tokenizer="")
    chex.assert_trees_all_equal(
        weights_file.load(tmp_path / "w.safetensors")[1], params
    )
    huggingface.write_folder(tmp_path / "out", config, turned, tokenizer=None)
    read = huggingface.read_weights(tmp_path / "out", config)
    chex.assert_trees_all_equal(read, params)


# Both spellings


def test_earlier_spellings_are_read_alike(folder):
    config, _ = model("llama3")
    path = folder / "config.json"
    change(
        path, architectures=["LlamaForCausalLM"], model_type="llama", rope_theta=5e5,
        rope_parameters=..., dtype=..., torch_dtype="bfloat16", rope_scaling={
            "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    expected = dataclasses.replace(config, rope_theta=5e5)
    assert huggingface.read_config(folder) == expected


def test_a_head_equal_to_the_tied_embedding_is_not_needed(tmp_path):
    config, params = model("tied")
    huggingface.write_folder(tmp_path / "out", config, params, tokenizer=None)
    file = tmp_path / "out" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, file)
    read = huggingface.read_weights(tmp_path / "out", config)
    chex.assert_trees_all_equal(read, params)
    tensors["lm_head.weight"][7, 3] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"does not have: lm_head.weight"):
        huggingface.read_weights(tmp_path / "out", config)


# Tokenizers and end tokens


def test_bytes_are_their_own_ids(written):
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    for text in ("Plain. \n\t", "naïve 猫 \0 Ā", "".join(map(chr, range(1, 128)))):
        ids = load_tokenizer(None).encode(text).tolist()
        assert found.encode(text).ids == ids and found.decode(ids) == text
    assert found.get_vocab_size() == 256


@pytest.mark.parametrize(
    ("file", "value", "expected"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}, "</s>"),
        ("tokenizer_config.json", {"eos_token": {"content": "<e>"}}, "<e>"),
        ("generation_config.json", {"eos_token_id": 5}, 5),
        ("generation_config.json", {"eos_token_id": [5]}, 5),
        ("generation_config.json", {"eos_token_id": [5, 6]}, None),
        ("config.json", {"eos_token_id": 7}, 7),
    ],
)
def test_the_end_token_is_the_one_a_folder_names(tmp_path, file, value, expected):
    assert huggingface.end_token(tmp_path) is None
    assert huggingface.tokenizer_path(tmp_path) is None
    (tmp_path / file).write_text(json.dumps(value))
    assert huggingface.end_token(tmp_path) == expected


def test_the_ends_of_answers_stay_beside_the_end_of_documents(written, tmp_path):
    given = tmp_path / "tokenizer.json"
    shutil.copyfile(written / "tokenizer.json", given)
    for ends, kept in [([7, 0], [7, 0]), ([7, 8], 0), (0, 0)]:
        answers = {"eos_token_id": ends, "temperature": 0.6}
        (tmp_path / "generation_config.json").write_text(json.dumps(answers))
        found = huggingface.tokenizers._generation(given, 0)
        assert found == {"eos_token_id": kept, "temperature": 0.6}


# Refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "qwen2"}, "'qwen2'.*only Qwen3ForCausalLM"),
        ({"architectures": ["Qwen3Model"]}, "Qwen3Model"),
        ({"attention_bias": True}, "`attention_bias` is True: biases"),
        ({"mlp_bias": True}, "`mlp_bias`"),
        ({"use_sliding_window": True}, "`use_sliding_window`"),
        ({"use_sliding_window": True, "sliding_window": 8}, "`sliding_window` is 8"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"no_rope_layers": [1, 0]}, "`no_rope_layers`"),
        ({"hidden_act": "gelu"}, "'gelu': another activation"),
        ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping` is 30.0"),
        ({"brand_new": 1}, "`brand_new` is 1: an unknown key"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is 'gptq'"),
        ({"quantization_config": {"bits": 4}}, "is {'bits': 4}: the weights"),
        ({"model_type": ["qwen3"]}, r"is \['qwen3'\] with"),
        ({"layer_types": "full"}, "`layer_types` has full: only"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "x"),
        (  # transformers takes a window of 4,096 where Mistral gives none
            {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "max_position_embeddings": 8192,
            },
            "`sliding_window` is 4096, below",
        ),
        ({"auto_map": {"AutoModel": "x.Y"}}, "`auto_map`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "no `low_freq"),
        ({"rope_theta": 5e5}, "`rope_theta` is given more than once"),
        ({"head_dim": ...}, "`head_dim` must be a whole number, got None"),
        ({"hidden_size": "16"}, "`hidden_size` must be a whole number, got '16'"),
        ({"num_key_value_heads": 4}, "multiple of `n_kv_heads`"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(folder, values, message):
    change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message) as caught:
        huggingface.read_config(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_all_faults_of_a_config_are_in_one_message(folder):
    change(folder / "config.json", mlp_bias=True, odd_key=3, hidden_act="relu")
    with pytest.raises(ValueError, match=r"relu(.|\n)*mlp_bias(.|\n)*odd_key"):
        huggingface.read_config(folder)


def first_part(folder):
    return min(folder.glob("*.safetensors"))


def cut_off(folder):
    path = first_part(folder)
    path.write_bytes(path.read_bytes()[:-4])


def without_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


def pickled(folder):
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def without_a_tensor(folder):
    path = first_part(folder)
    tensors = safetensors.numpy.load_file(path)
    name = min(tensors)
    extra = {f"{name}.bias": tensors.pop(name)}
    safetensors.numpy.save_file(tensors | extra, path)


def of_another_type(folder):
    path = first_part(folder)
    tensors = safetensors.numpy.load_file(path)
    whole = {name: x.astype(np.int8) for name, x in tensors.items()}
    safetensors.numpy.save_file(whole, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_weights, "no weights: neither model.safetensors"),
        (pickled, "pickled .pytorch_model.bin"),
        (cut_off, "00001-of-.*damaged or cut off"),
        (lambda folder: first_part(folder).unlink(), "no such file, but model.safe"),
        (without_a_tensor, r"names tensors that the parts do not have"),
        (of_another_type, "must be F32, BF16, F16, got I8"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "has no `weight_map`",
        ),
    ],
    ids=["none", "pickled", "cut", "absent", "tensor", "type", "index"],
)
def test_damaged_weights_are_refused_before_any_is_read(folder, spoil, message):
    spoil(folder)
    put = lambda path, x: pytest.fail("read a tensor")
    with pytest.raises(ValueError, match=message):
        huggingface.read_weights(folder, QWEN3, put=put)


def test_weights_of_other_settings_are_refused_with_all_differences(folder):
    other = dataclasses.replace(QWEN3, n_layers=3, ffn_mult=3.0)
    with pytest.raises(ValueError, match=r"missing: (.|\n)*up_proj.* must be \[48, 16"):
        huggingface.read_weights(folder, other)


def refuse_to_write(path, message, config=QWEN3, **options):
    params = gpt.abstract_model(config)[1]
    with pytest.raises(ValueError, match=message):
        huggingface.write_folder(path, config, params, **{"tokenizer": None, **options})


def test_refused_models_and_folders_write_nothing(tmp_path, written):
    ternary = dataclasses.replace(QWEN3, qk_norm="unit", ternary=True)
    small = dataclasses.replace(QWEN3, vocab_size=200)
    out = tmp_path / "out"
    refuse_to_write(out, "ternary.*`--latent`", ternary)
    refuse_to_write(out, "256 ids.*only 200", small)
    refuse_to_write(out, "`dtype` must be one of", dtype="int8")
    refuse_to_write(out, "no such file", tokenizer=tmp_path / "absent.json")
    assert [*tmp_path.iterdir()] == []
    before = sorted(written.iterdir())
    refuse_to_write(written, "is there already")
    assert sorted(written.iterdir()) == before


def test_a_failure_leaves_no_half_a_folder(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    config, params = model()
    with pytest.raises(OSError, match="disk full"):
        huggingface.write_folder(tmp_path / "out", config, params, tokenizer=None)
    assert [*tmp_path.iterdir()] == []
