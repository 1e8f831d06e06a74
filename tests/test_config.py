"""Settings load as written, and whatever is wrong with them is said at once."""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax import OptimizerConfig
from nanochat_jax.commands.usage.flags import flags_of
from nanochat_jax.commands.usage.registry import COMMANDS
from nanochat_jax.config import (
    PARENT_ONLY,
    REMOVED,
    Config,
    ModelConfig,
    schema,
    spelling,
    without_removed,
)
from nanochat_jax.optimizer import schedule

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
FAMILIES = ("nano_125m", "tiny_cpu", "compare_3m", "nanochat_groups")
VARIANTS = {
    "muon": {},
    "muon_8bit": {"use_8bit_optim": True},
    "muon_4bit": {"use_8bit_optim": True, "quant_bits": 4},
    "galore": {"use_galore": True},
    "galore_8bit": {"use_galore": True, "use_8bit_optim": True},
    "galore_4bit": {"use_galore": True, "use_8bit_optim": True, "quant_bits": 4},
    "galore_plain": {"use_galore": True, "galore_residual": 0.0},
    "galore_plain_8bit": {
        "use_galore": True, "galore_residual": 0.0, "use_8bit_optim": True,
    },
}  # fmt: skip

# A file with the keys of the parent project, nanochat-rs-ternary.
PARENT = """
dim = 768
n_layers = 12
n_heads = 12
n_kv_heads = 4
ffn_mult = 2.6875
vocab_size = 50257
max_seq_len = 512
group_size = 128
mhc_n_streams = 2
weight_tied = true
rope_theta = 10000.0
lr = 0.02
mhc_lr = 0.0001
weight_decay = 0.0
batch_size = 8
grad_accum_steps = 4
warmup_steps = 500
total_steps = 50000
decay_start_frac = 0.8
grad_clip = 1.0
ns_steps = 3
muon_momentum = 0.9
lion_betas = [0.9, 0.98]
use_8bit_optim = true
use_galore = true
galore_rank = 192
galore_update_freq = 100
distill_kl_weight = 0.0
loop_scale_penalty = 0.0
"""


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a settings file and returns its path."""

    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(load, *args):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers read the message)
        load(*args)
    return str(error.value)


@pytest.mark.parametrize("cls", [OptimizerConfig, Config])
def test_a_file_of_the_parent_project_loads_with_one_warning(cls, write):
    path = write(PARENT)
    with pytest.warns(UserWarning, match="no effect") as caught:
        config = cls.from_toml(path)
    [warning] = caught
    assert warning.filename == __file__  # where the file is loaded
    assert str(path) in str(warning.message)
    named = str(warning.message).split("effect: ")[1].rstrip(".").split(", ")
    assert named == sorted(PARENT_ONLY)
    assert config.ns_steps == 3
    assert config.lion_betas == (0.9, 0.98)
    assert config.rank == 192
    assert config.galore_update_freq == 100
    assert config.variant == "galore_8bit"
    if cls is Config:
        assert (config.dim, config.kv_heads, config.head_size) == (768, 4, 64)
        assert config.ffn_dim == 2064
        assert config.tokens_per_step == 4 * 8 * 512


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads_as_the_variant_of_its_name(path):
    config = Config.from_toml(path)
    [family] = [name for name in FAMILIES if path.stem.startswith(name)]
    variants = {"": "muon", "_8bit": "muon_8bit", "_galore": "galore",
                "_8bit_galore": "galore_8bit"}  # fmt: skip
    assert config.variant == variants[path.stem.removeprefix(family)]
    first = Config.from_toml(path.with_name(f"{family}.toml"))
    shape = [field.name for field in dataclasses.fields(ModelConfig)]
    assert all(getattr(config, name) == getattr(first, name) for name in shape)


@pytest.mark.parametrize("cls", [OptimizerConfig, Config])
def test_what_is_not_in_the_file_is_the_default(cls, write):
    assert cls.from_toml(write("")) == cls()
    assert cls.from_toml(write("lr = 1\n")) == dataclasses.replace(cls(), lr=1.0)


def test_unknown_keys_are_all_named_with_the_nearest_known_one(write):
    path = write("galore_rnk = 64\nuse_8bit = true\nzzz = 1\nmax_iters = 9\n")
    said = message(OptimizerConfig.from_toml, path)
    first, second, third, last = said.splitlines()  # in the order of the file
    assert first == f"{path}: unknown key `galore_rnk`. Did you mean `galore_rank`?"
    assert second == f"{path}: unknown key `use_8bit`. Did you mean `use_8bit_optim`?"
    assert third.startswith(f"{path}: unknown key `zzz`. `nanochat-jax train --help`")
    # Other programs' names are known, and keys of the whole run to both classes.
    assert last == f"{path}: unknown key `max_iters`. Did you mean `total_steps`?"
    said = message(OptimizerConfig.from_toml, write("block_size = 8\n"))
    assert "Did you mean `seq_len`?" in said


def test_every_other_name_stands_for_a_setting_or_a_flag():
    fields = {*flags_of(COMMANDS["train"].load()), *flags_of(COMMANDS["plan"].load())}
    for command in ("generate", "prepare-data"):
        fields |= {*flags_of(COMMANDS[command].load())}
    assert spelling.OTHER_NAMES.keys() - fields == {"steps"}  # of `compare`


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("use_galore = 1", "must be of type bool, got 1 (int)"),
        ("galore_rank = true", "must be of type int, got True (bool)"),
        ("galore_rank = 64.0", "must be an int of at least 1 or a fraction in (0, 1)"),
        ("lr = '0.02'", "must be of type float, got '0.02' (str)"),
        ("lr = true", "must be of type float, got True (bool)"),
        ("adam_betas = [0.9]", "must be a list of 2 values, got [0.9]"),
        ("lion_betas = 0.9", "must be a list of 2 values, got 0.9"),
        ("fallback = 'sgd'", "must be one of ['adamw', 'lion'], got 'sgd'"),
        ("hardware = 'd'", "must be one of ['a', 'b', 'c'], got 'd'"),
        ("quant_bits = 16", "must be one of [8, 4], got 16"),
        ("quant_bits = true", "must be one of [8, 4], got True"),
        ("quantize_embeddings = 1", "must be of type bool, got 1 (int)"),
        ("galore_rank = 0", "must be at least 1, got 0"),
        ("galore_update_freq = 0", "must be at least 1, got 0"),
        ("ns_steps = 0", "must be at least 1, got 0"),
        ("quant_block_size = 0", "must be at least 1, got 0"),
        ("total_steps = 0", "must be at least 1, got 0"),
        ("warmup_steps = -1", "must be at least 0, got -1"),
        ("lr = -0.1", "must be at least 0, got -0.1"),
        ("weight_decay = -0.1", "must be at least 0, got -0.1"),
        ("grad_clip = -1", "must be at least 0, got -1.0"),
        ("galore_residual = -1", "must be at least 0, got -1.0"),
        ("seed = -1", "must be at least 0, got -1"),
        ("muon_momentum = 1.0", "must lie in [0, 1)"),
        ("adam_betas = [0.9, 1.0]", "must lie in [0, 1), got (0.9, 1.0)"),
        ("lion_betas = [-0.1, 0.9]", "must lie in [0, 1), got (-0.1, 0.9)"),
        ("decay_start_frac = 1.5", "must lie in [0, 1], got 1.5"),
        ("min_lr_frac = -0.5", "must lie in [0, 1], got -0.5"),
        ("schedule = 'step'", "must be one of ['wsd', 'cosine', 'linear'], got 'step'"),
    ],
)
@pytest.mark.parametrize("cls", [OptimizerConfig, Config])
def test_a_value_that_is_not_allowed_names_file_and_key(cls, line, said, write):
    path = write(line)
    key = line.split(" = ")[0]
    assert f"{path}: `{key}` {said}" in message(cls.from_toml, path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dim = 0", "`dim` must be at least 1, got 0"),
        ("n_layers = 0", "`n_layers` must be at least 1, got 0"),
        ("n_heads = 0", "`n_heads` must be at least 1, got 0"),
        ("dim = 60", "even multiple of `n_heads`, got 60 and 4"),
        ("n_kv_heads = 3", "multiple of `n_kv_heads`, got 4 and 3"),
        ("n_kv_heads = 0", "multiple of `n_kv_heads`, got 4 and 0"),
        ("ffn_mult = 0", "`ffn_mult` must "),
        ("rope_theta = -1", "`rope_theta` must be positive, got -1.0"),
        ("compute_dtype = 'float16'", "one of ['float32', 'bfloat16'], got 'float16'"),
        ("seq_len = 513", "between 1 and `max_seq_len`, got 513 and 512"),
        ("seq_len = 0", "between 1 and `max_seq_len`, got 0 and 512"),
        ("batch_size = 0", "`batch_size` must be at least 1, got 0"),
        ("grad_accum_steps = 0", "`grad_accum_steps` must be at least 1, got 0"),
        ("eval_interval = -1", "`eval_interval` must be at least 0, got -1"),
        ("max_skipped_steps = 0", "`max_skipped_steps` must be at least 1, got 0"),
        ("spike_skip = -1", "`spike_skip` must be at least 0, got -1.0"),
        ("sample_interval = -1", "`sample_interval` must be at least 0, got -1"),
        ("keep_checkpoint_every = 0", "`keep_checkpoint_every` must be at least 1"),
        ("keep_checkpoint_every = 750", "of `checkpoint_interval`, got 750 and 500"),
        ("dataset = 'web'", "must be one of ['stdlib', 'text', 'tokens', 'jsonl', 'pa"),
        ("data_path = ['a', 3]", "`data_path` must be of type str, got 3 (int)"),
    ],
)
def test_a_setting_of_model_or_training_that_is_not_allowed(line, said, write):
    path = write(line)
    assert message(Config.from_toml, path).startswith(f"{path}: ")
    assert said in message(Config.from_toml, path)
    OptimizerConfig.from_toml(path)  # leaves the other classes' keys alone


def test_offenders_of_one_kind_are_in_one_message(write):
    path = write("lr = 'x'\nuse_galore = 2\nbatch_size = 0.5\n")
    assert sorted(message(Config.from_toml, path).splitlines()) == [
        f"{path}: `batch_size` must be of type int, got 0.5 (float).",
        f"{path}: `lr` must be of type float, got 'x' (str).",
        f"{path}: `use_galore` must be of type bool, got 2 (int).",
    ]
    path = write("lr = -1\ngalore_rank = 0\nadam_betas = [2, 0]\n")
    said = message(OptimizerConfig.from_toml, path).splitlines()
    assert sorted(line.split("`")[1] for line in said) == [
        "adam_betas", "galore_rank", "lr",
    ]  # fmt: skip
    assert all(line.startswith(f"{path}: ") for line in said)


def test_offenders_of_all_kinds_are_in_one_message(write):
    path = write("galore_rnk = 1\nlr = 'x'\ndim = 0\nns_steps = 0\nbatch_size = 0\n")
    said = message(Config.from_toml, path)
    for key in ("galore_rnk", "lr", "dim", "ns_steps", "batch_size"):
        assert f"{path}: " in said
        assert f"`{key}`" in said


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"galore_rank": 0}, "galore_rank"),
        ({"galore_rank": "64"}, "galore_rank"),
        ({"quant_bits": 3}, "quant_bits"),
        ({"hardware": "d"}, "hardware"),
    ],
)
def test_settings_written_in_python_are_checked_too(values, key):
    with pytest.raises((TypeError, ValueError), match=f"`{key}` must be"):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    "line",
    [
        "quant_bits = 8.0",
        "lr = nan",
        "lr = inf",
        "weight_decay = inf",
        "ffn_mult = inf",
        "ffn_mult = 1e-9",  # no hidden unit at all
        "rope_theta = inf",
        "seed = 4294967296",  # the order of the data takes 32 bits
    ],
)
def test_values_no_run_could_use_are_refused(line, write):
    path = write(line)
    assert f"{path}: `{line.split(' = ')[0]}`" in message(Config.from_toml, path)


@pytest.mark.parametrize("cls", [OptimizerConfig, ModelConfig, Config])
def test_every_class_reads_its_own_keys_of_the_file_of_a_run(cls, write):
    path = write("dim = 64\nquant_bits = 4\nbatch_size = 2\n")
    config = cls.from_toml(path)
    own = {"dim": 64, "quant_bits": 4, "batch_size": 2}
    names = {field.name for field in dataclasses.fields(cls)}
    assert all(getattr(config, name) == own[name] for name in names & set(own))
    assert names & set(own)
    said = message(cls.from_toml, write("batch_sise = 2\n"))
    assert "Did you mean `batch_size`?" in said


GONE = {
    "galore_adaptive": True,
    "galore_match_norm": True,
    "galore_momentum_share": 0.5,
    "galore_scale": 0.25,
    "galore_stagger": True,
    "galore_warm_start": True,
    "quant_codec": "dynamic8",
    "quant_scale_dtype": "float32",
    "galore_rest_bits": 8,
    "ns_dtype": "float16",
    "projector_bits": 16,
    "quant_bits": 2,
    "galore_rank": {"attention": 128, "*": 0.25},
}
"""Settings of version 0.1.0 that later versions cannot follow."""


def test_every_removed_key_has_an_example_here():
    assert REMOVED.keys() <= GONE.keys()
    assert not REMOVED.keys() & {field.name for field in dataclasses.fields(Config)}


def test_settings_that_are_removed_are_all_refused_by_name_and_version(write):
    recorded = dataclasses.asdict(Config()) | GONE
    said = message(without_removed, recorded, "runs/a").splitlines()
    assert sorted(line.split("`")[1] for line in said) == sorted(GONE)
    for line in said:
        value = GONE[line.split("`")[1]]
        assert line.startswith("runs/a: ")
        assert f"= {value!r} is no longer supported" in line
        assert "nanochat-jax 0.1.0" in line


@pytest.mark.parametrize("key", GONE)
def test_a_file_that_sets_what_is_removed_is_refused_by_name(key, write):
    value = GONE[key]
    text = {bool: str(value).lower(), dict: "{attention = 128}"}
    path = write(f"{key} = {text.get(type(value), repr(value))}\n")
    (said,) = message(OptimizerConfig.from_toml, path).splitlines()
    assert f"{path}: `{key}` = " in said
    assert "nanochat-jax 0.1.0" in said


def test_removed_keys_that_did_nothing_load_with_one_warning(write):
    recorded = dataclasses.asdict(Config(lr=0.5)) | REMOVED
    assert Config(**without_removed(recorded, "runs/a")) == Config(lr=0.5)
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in REMOVED.items()
    ]
    path = write("\n".join([*lines, "lr = 0.5"]))
    with pytest.warns(UserWarning, match="removed") as caught:
        assert Config.from_toml(path) == Config(lr=0.5)
    [warning] = caught
    assert warning.filename == __file__
    assert all(key in str(warning.message) for key in REMOVED)


def test_a_missing_file_says_so(tmp_path):
    path = tmp_path / "absent.toml"
    assert message(Config.from_toml, path).startswith(f"{path}: no such file.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"lr = \n", "not valid TOML"),
        (b"lr = 1\nlr = 2\n", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"lr = 1\n[optimizer]\nlr = 2\n", "one flat table, but it has the tables"),
    ],
)
def test_a_file_that_is_no_flat_toml_is_refused(content, said, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert message(Config.from_toml, path).startswith(f"{path}: ")
    assert said in message(Config.from_toml, path)


def test_a_folder_is_no_file(tmp_path):
    assert f"{tmp_path}: cannot be read" in message(schema.read_toml, tmp_path)


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ({}, 256),
        ({"hardware": "a"}, 512),
        ({"hardware": "b"}, 256),
        ({"hardware": "c"}, 384),
        ({"hardware": "a", "galore_rank": 64}, 64),
        ({"galore_rank": 64}, 64),
    ],
)
def test_hardware_gives_the_rank_unless_it_is_given(values, rank):
    assert OptimizerConfig(**values).rank == rank


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_has_its_name(variant):
    assert OptimizerConfig(**VARIANTS[variant]).variant == variant


def test_projector_bits_follow_the_momentum_unless_given():
    assert OptimizerConfig().stored_projector_bits == 8
    assert OptimizerConfig(use_8bit_optim=True).stored_projector_bits == 4
    assert OptimizerConfig(projector_bits=32).stored_projector_bits == 32


def test_the_fallback_has_a_rate_of_its_own():
    assert OptimizerConfig().fallback_peak_lr == 0.003
    assert OptimizerConfig(fallback="lion").fallback_peak_lr == 0.0003
    assert OptimizerConfig(fallback_lr=0.0).fallback_peak_lr == 0.0


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize(
    ("warmup", "total", "frac"),
    [(0, 10, 0.8), (1, 10, 0.5), (5, 20, 0.5), (5, 10, 0.5), (4, 10, 1.0), (0, 8, 0.0),
     (0, 1, 0.8)],
)  # fmt: skip
def test_the_rate_rises_stays_and_falls(warmup, total, frac, kind, floor):
    config = OptimizerConfig(
        warmup_steps=warmup, total_steps=total, decay_start_frac=frac, schedule=kind,
        min_lr_frac=floor,
    )  # fmt: skip
    steps = np.arange(total)
    rates = jax.vmap(schedule(config, 0.5))(jnp.arange(total))
    rise = (steps + 1) / max(warmup, 1)
    start = round(frac * total) if kind == "wsd" else warmup
    left = np.clip((total - steps) / max(total - start, 1), 0, 1)
    if kind == "cosine":
        left = (1 - np.cos(np.pi * left)) / 2
    fall = floor + (1 - floor) * left
    np.testing.assert_allclose(rates, 0.5 * np.minimum(rise, fall), 1e-5)
    assert rates[0] > 0
    assert rates[-1] > 0


def test_the_warm_up_must_end_before_the_decay_begins(write):
    path = write("warmup_steps = 81\ntotal_steps = 100\n")
    said = message(Config.from_toml, path)
    assert "`warmup_steps` must end before" in said
    assert "at step 80" in said
    OptimizerConfig(warmup_steps=80, total_steps=100)
    said = message(
        Config.from_toml, write("schedule = 'linear'\nwarmup_steps = 2000\n")
    )
    assert "`warmup_steps` must end before the run does, at step 1000" in said
    OptimizerConfig(warmup_steps=81, total_steps=100, schedule="cosine")


def test_a_number_of_adamw_is_refused_where_nothing_uses_it():
    lion = {"fallback": "lion", "vector_adam_b2": 0.99}
    with pytest.raises(ValueError, match="`vector_adam_b2` is a number of AdamW"):
        Config(**lion)
    assert Config(**lion, groups=({"match": "head", "optimizer": "adamw", "lr": 1e-3},))


def test_loading_a_file_without_foreign_keys_warns_of_nothing(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.from_toml(write("lr = 0.01\nseq_len = 64\n"))


def test_numbers_of_numpy_and_jax_are_numbers():
    plain = nj.OptimizerConfig(lr=0.5, galore_rank=64, adam_betas=(0.5, 0.25))
    for make in (np.float32, np.float64, jnp.float32):
        betas = [make(0.5), make(0.25)]
        config = nj.OptimizerConfig(
            lr=make(0.5), galore_rank=np.int64(64), adam_betas=betas
        )
        assert config == plain
        assert type(config.lr) is float and type(config.galore_rank) is int


def test_rates_that_are_traced_or_scheduled_are_given_to_the_builder():
    config = nj.OptimizerConfig(grad_clip=0.0)
    # Of full rank: what is next to nothing is not orthogonalised alike by two programs.
    params = {"kernel": jnp.eye(4, 8)}

    @jax.jit
    def update(rate):
        with pytest.raises(ValueError, match=r"`weight_decay` must be known.*`lr`"):
            nj.OptimizerConfig(weight_decay=rate)
        with pytest.raises(ValueError, match=r"`lr` must be known when"):
            Config(lr=rate)
        tx = nj.build_optimizer(config, params, learning_rate=rate)
        return tx.update(params, tx.init(params), params)[0]

    tx = nj.build_optimizer(config, params, learning_rate=lambda count: 0.5)
    scheduled, _ = tx.update(params, tx.init(params), params)
    helpers.assert_close(update(0.5), scheduled)
    helpers.assert_close(update(1.0), optax.tree.scale(2, scheduled))
