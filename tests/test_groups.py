"""Groups change what they say of the parameters they match, and nothing else."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax.commands.usage.flags import flags_of
from nanochat_jax.commands.usage.registry import COMMANDS
from nanochat_jax.config import Config, Group
from nanochat_jax.lm.checkpoints import differences
from nanochat_jax.lm.planning import breakdown, run_memory
from nanochat_jax.optimizer import update_in_backward
from nanochat_jax.optimizer.groups import by_group, groups_of
from nanochat_jax.optimizer.roles import frozen_by, settle
from nanochat_jax.transforms import decay_weights

LAYER = {"up": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)}}
PARAMS = {
    "embed": {"embedding": jnp.ones((16, 8))},
    "lm_head": {"kernel": jnp.ones((8, 16))},
    "blocks": {"0": LAYER, "1": jax.tree.map(lambda x: 2 * x, LAYER)},
}
GRADS = jax.tree.map(lambda x: jnp.cos(jnp.cumsum(x, -1)), PARAMS)
FEW = {"use_8bit_optim": True, "quant_min_size": 1}
LOW = {"use_galore": True, "galore_rank": 3, "galore_update_freq": 2}


def build(groups=(), params=PARAMS, **settings):
    settings = {"grad_clip": 0.0, "ns_steps": 2, "weight_decay": 0.05} | settings
    config = nj.OptimizerConfig(groups=tuple(groups), **settings)
    return nj.build_optimizer(config, params)


def updates_of(tx, steps=2, params=PARAMS, grads=GRADS):
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = step(grads, state, params)
    return updates, state


GROUPS = (
    Group("embed", lr=0.2, betas=(0.5, 0.9)),
    Group(".*head", weight_decay=0.5),
    Group("blocks/1", lr=0.1, muon_scale="rms", muon_momentum=0.5),
)
# The settings that make the same of all parameters, and the part to compare.
NUMBERS = (
    ({"fallback_lr": 0.2}, lambda tree: tree["embed"]),
    ({"weight_decay": 0.5}, lambda tree: tree["lm_head"]),
    (
        {"lr": 0.1, "fallback_lr": 0.1, "muon_scale": "rms", "muon_momentum": 0.5},
        lambda tree: tree["blocks"]["1"],
    ),
)


@pytest.mark.parametrize("settings", [{}, FEW | LOW, {"fallback": "lion"}])
def test_groups_of_numbers_leave_the_state_as_it_is(settings):
    held = (jax.eval_shape(build(x, **settings).init, PARAMS) for x in ((), GROUPS))
    chex.assert_trees_all_equal_shapes_and_dtypes(*held)


@pytest.mark.parametrize("settings", [{}, {"fallback": "lion"} | FEW])
def test_each_group_has_the_updates_of_its_numbers(settings):
    updates, _ = updates_of(build(GROUPS, **settings))
    plain, _ = updates_of(build(**settings))
    chex.assert_trees_all_close(updates["blocks"]["0"], plain["blocks"]["0"], rtol=1e-6)
    betas = "lion_betas" if "fallback" in settings else "adam_betas"
    for numbers, pick in NUMBERS:
        alone = {betas: (0.5, 0.9)} if numbers == {"fallback_lr": 0.2} else {}
        expected, _ = updates_of(build(**settings | numbers | alone))
        chex.assert_trees_all_close(pick(updates), pick(expected), rtol=1e-5)
        assert not jnp.allclose(first(pick(updates)), first(pick(plain)))


def first(tree):
    return jax.tree.leaves(tree)[-1]


def test_a_state_goes_on_with_other_groups():
    _, state = updates_of(build())
    tx = build([Group("blocks/.*", lr=0.5)])
    chex.assert_trees_all_equal_structs(state, jax.eval_shape(tx.init, PARAMS))
    updates, _ = jax.jit(tx.update)(GRADS, state, PARAMS)
    plain, _ = jax.jit(build().update)(GRADS, state, PARAMS)
    ratio = (
        updates["blocks"]["1"]["up"]["kernel"] / plain["blocks"]["1"]["up"]["kernel"]
    )
    np.testing.assert_allclose(ratio, 0.5 / 0.02, rtol=1e-5)


def test_the_first_group_that_matches_a_path_or_a_module_has_the_parameter():
    groups = [Group("blocks/1"), Group(".*/(kernel|bias)"), Group("embed/.*")]
    found = groups_of(groups, PARAMS)
    assert len(found) == len(jax.tree.leaves(PARAMS))
    numbers = [groups.index(group) for group in found.values()]
    assert sorted(numbers) == [0, 0, 1, 1, 1, 2]
    assert found["['blocks']['1']['up']['bias']"] is groups[0]
    # The whole path counts, not a part of it.
    assert groups_of([Group("block", optional=True)], PARAMS) == {}


def test_groups_without_parameters_are_all_told_in_one_message():
    groups = [Group("embd"), Group("embed"), Group("embed/emb.*"), Group("zz")]
    with pytest.raises(ValueError, match="'embd' matches no") as error:
        build(groups)
    said = str(error.value).splitlines()
    assert len(said) == 3
    assert "such as embed" in said[0]
    assert "in groups before it, 'embed'" in said[1]
    assert "'zz' matches no parameter" in said[2]
    optional = [dataclasses.replace(x, optional=True, lr=1.0) for x in groups]
    with pytest.raises(ValueError, match="'embd'"):
        nj.muon(0.02, groups=[*optional[1:], groups[0]]).init(PARAMS)
    nj.muon(0.02, groups=optional).init(PARAMS)


def test_layers_of_a_stack_are_one_parameter():
    stack = {"blocks": {"up": {"kernel": jnp.ones((3, 8, 24))}}}
    for pattern in ("blocks/1", r"blocks/\d+/up", "blocks/.*/up"):
        with pytest.raises(ValueError, match="stacked in one array, blocks/up/kernel"):
            groups_of([Group(pattern, optional=True)], stack)
    assert len(groups_of([Group("blocks/.*kernel")], stack)) == 1


def test_a_group_chooses_the_optimizer_and_muon_takes_matrices_alone():
    groups = [
        Group("embed", optimizer="muon"),
        Group("blocks/0/up/kernel", optimizer="adamw"),
        Group("blocks/1/up/kernel", optimizer="lion", lr=0.1),
    ]
    tx = build(groups, **FEW, weight_decay=0.0)
    leaves = {x.path: x for x in nj.describe(tx, PARAMS).leaves}
    found = {path: (x.label, x.optimizer, x.state) for path, x in leaves.items()}
    assert found["embed/embedding"] == ("matrix", "Muon", "momentum Int8")
    assert found["blocks/0/up/kernel"] == ("vector", "AdamW", "mu Int8, nu Dynamic8")
    assert found["blocks/1/up/kernel"] == ("vector", "Lion", "mu Int8")
    assert leaves["blocks/1/up/kernel"].reason.endswith("group 'blocks/1/up/kernel'")
    updates, _ = updates_of(tx, 1)
    np.testing.assert_allclose(jnp.abs(updates["blocks"]["1"]["up"]["kernel"]), 0.1)
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(24,\)"):
        build([Group("blocks/0", optimizer="muon")])


def test_a_matrix_under_adamw_decays_and_a_vector_does_not():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = build([Group("blocks/0", optimizer="adamw", lr=1.0)], weight_decay=0.25)
    updates, _ = updates_of(tx, 1, grads=zeros)
    assert {float(x) for x in updates["blocks"]["0"]["up"]["kernel"].ravel()} == {-0.25}
    assert not updates["blocks"]["0"]["up"]["bias"].any()
    tx = build([Group(".*bias", weight_decay=0.5, lr=1.0)])
    updates, _ = updates_of(tx, 1, grads=zeros)
    assert {float(x) for x in updates["blocks"]["0"]["up"]["bias"]} == {-0.5}


def test_frozen_groups_have_neither_state_nor_update():
    groups = [Group("embed", freeze=True), Group("blocks", lr=0.5)]
    tx = build(groups)
    updates, _ = updates_of(tx, 1)
    assert not updates["embed"]["embedding"].any()
    leaves = {x.path: x for x in nj.describe(tx, PARAMS).leaves}
    assert leaves["embed/embedding"].state_bytes == 0
    assert leaves["embed/embedding"].reason == "group 'embed'"
    assert frozen_by((), PARAMS, groups) == {"['embed']['embedding']": "embed"}
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        frozen_by((), PARAMS, [Group(".*", freeze=True)])


def test_rates_are_told_by_group_and_schedules_stay_schedules():
    falls = optax.linear_schedule(0.02, 0.0, 10)
    tx = nj.muon(falls, groups=[Group("blocks/1", lr=0.5), Group("embed", lr=0.1)])
    rates = nj.learning_rates(tx, updates_of(tx, 5)[1], PARAMS)
    expected = {
        "matrix": 0.01, "matrix blocks/1": 0.5, "vector": 0.0015,
        "vector blocks/1": 0.5, "embedding embed": 0.1, "head": 0.0015,
    }  # fmt: skip
    assert rates.keys() == expected.keys()
    for name, rate in rates.items():
        np.testing.assert_allclose(rate, expected[name], rtol=1e-5)
    described = {x.path: x.rate for x in nj.describe(tx, PARAMS).leaves}
    assert described["embed/embedding"] == "schedule, 0.1 at first"


FALLS = optax.linear_schedule(0.02, 0.0, 10)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(nj.muon, 0.02, weight_decay=0.1),
        functools.partial(nj.muon, FALLS, weight_decay=FALLS),
        lambda groups: build(groups),
        lambda groups: build(groups, total_steps=9, weight_decay_schedule="linear"),
    ],
)
def test_the_state_does_not_tell_which_numbers_are_those_of_a_group(make):
    of_all = [Group(".*", lr=0.1, weight_decay=0.2, muon_momentum=0.5)]
    for groups in (of_all, [Group("embed", lr=0.1), Group("blocks/1", lr=0.3)]):
        without, state = (
            jax.eval_shape(make(groups=x).init, PARAMS) for x in ((), groups)
        )
        chex.assert_trees_all_equal_structs(without, state)


def test_a_rate_that_is_a_number_is_told_as_one():
    tx = nj.muon(0.02, groups=[Group("embed", lr=0.1)])
    rates = {leaf.path: leaf.rate for leaf in nj.describe(tx, PARAMS).leaves}
    assert rates["embed/embedding"] == "0.1"


def test_a_group_follows_the_warm_up_and_the_decay_of_the_run():
    settings = {"warmup_steps": 4, "total_steps": 20, "schedule": "linear"}
    tx = build([Group("blocks/0", lr=0.8)], **settings)
    for steps in (1, 6, 15):
        rates = nj.learning_rates(tx, updates_of(tx, steps)[1], PARAMS)
        ratio = rates["matrix blocks/0"] / rates["matrix"]
        np.testing.assert_allclose(ratio, 0.8 / 0.02, rtol=1e-5)


TOML = """
lr = 0.02
[[group]]
match = "embed"
lr = 0.2
betas = [0.8, 0.995]
[[group]]
match = "blocks.*kernel"
muon_scale = "rms"
optional = true
"""


@pytest.mark.parametrize("cls", [nj.OptimizerConfig, Config])
def test_tables_of_a_file_are_read_recorded_and_read_again(cls, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    config = cls.from_toml(path)
    assert config.groups == (
        Group("embed", lr=0.2, betas=(0.8, 0.995)),
        Group("blocks.*kernel", muon_scale="rms", optional=True),
    )
    recorded = json.loads(json.dumps(dataclasses.asdict(config)))
    assert cls.from_values(recorded, "a checkpoint") == config
    # A run with other groups is another run.
    other = dataclasses.replace(config, groups=config.groups[:1])
    said = r"config\.groups\.1\.muon_scale: stored 'rms', now none"
    with pytest.raises(ValueError, match=said):
        differences.check_meta(
            {"config": recorded}, {"config": dataclasses.asdict(other)}
        )


def test_groups_are_no_flag():
    for command in ("train", "plan"):
        flags = flags_of(COMMANDS[command].load())
        assert "lr" in flags
        assert "groups" not in flags


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[group]\nmatch = 'a'", r"`\[\[group\]\]`, with two brackets"),
        ("group = 'a'", "`group` must be tables"),
        ("[[group]]\nlr = 1.0", "must be a table with the key `match`"),
        ("[[group]]\nmatch = 'a'\nlrr = 1.0", "match 'a': unknown key `lrr`.*`lr`"),
        ("[[group]]\nmatch = '('", r"a regular expression, got '\('"),
        ("[[group]]\nmatch = 'a'\nlr = -1.0", "`lr` must be at least 0"),
        ("[[group]]\nmatch = 'a'\nbetas = [0.9, 1.0]", r"`betas` must lie in \[0, 1\)"),
        (
            "[[group]]\nmatch = 'a'\noptimizer = 'muon'\nbetas = [0.9, 0.9]",
            r"\['betas'\] have no effect with `optimizer = 'muon'`",
        ),
        ("[[group]]\nmatch = 'a'\nfreeze = true\nlr = 0.0", "`freeze` leaves no"),
        ("[[group]]\nmatch = 'a'\noptimizer = 'lion'", "`lr` is required in the group"),
    ],
)  # fmt: skip
def test_tables_that_are_not_allowed_are_refused_by_name(text, said, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Config.from_toml(path)


def test_settings_for_none_of_the_parameters_are_refused_together():
    groups = [Group("embed", muon_scale="rms"), Group(".*up/kernel", betas=(0.9, 0.9))]
    with pytest.raises(ValueError, match="which are Muon's alone") as error:
        settle(PARAMS, groups=groups)
    assert "which are AdamW's or Lion's alone" in str(error.value)


@pytest.mark.parametrize("optional", [False, True])
def test_a_group_of_frozen_parameters_is_refused_unless_it_is_optional(optional):
    groups = [Group("embed", lr=0.1, optional=optional)]
    if optional:
        assert settle(PARAMS, groups=groups, freeze=["embed"])
    else:
        with pytest.raises(ValueError, match="its parameters are frozen"):
            settle(PARAMS, groups=groups, freeze=["embed"])


def test_no_leaves_at_all_are_updated_to_none():
    rates = {"a": decay_weights(0.1), "b": decay_weights(0.2)}
    tx = by_group(rates, {"['x']": "a", "['y']": "b"})
    none = {"x": None, "y": None}
    assert tx.update(none, tx.init(none), none)[0] == none


def test_vectors_have_a_memory_of_their_own_wherever_adamw_has_them():
    """Under a group too that sends them to AdamW, or others to Lion."""
    lion = {"fallback": "lion", "lion_betas": (0.9, 0.99)}
    to_adamw = (Group(".*bias", optimizer="adamw", lr=0.1), Group("embed", lr=0.1))
    to_lion = (Group("lm_head", optimizer="lion", lr=0.1), Group(".*bias", lr=0.1))
    for settings, groups in ((lion, to_adamw), ({}, to_lion)):
        short, usual = (
            updates_of(build(groups, **settings, vector_adam_b2=b2), 3)[0]
            for b2 in (0.5, None)
        )
        differ = jax.tree.map(lambda x, y: bool((x != y).any()), short, usual)
        vectors = jax.tree.map(lambda x: x.ndim == 1, PARAMS)
        assert differ == vectors


def test_rates_of_groups_may_be_traced():
    def step(rate, double):
        tx = build([Group("embed", lr=rate), Group("blocks", lr=double)])
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]

    # Both in one program each, so that nothing but the rates is worked out otherwise.
    got, expected = jax.jit(step)(0.5, 1.0), jax.jit(lambda: step(0.5, 1.0))()
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_a_plan_has_a_line_for_each_label_in_a_group():
    groups = (Group("blocks/0", lr=0.5), Group("blocks.*kernel", weight_decay=0.5))
    config = Config(
        dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=16, groups=groups,
        dataset="synthetic",
    )  # fmt: skip
    run = run_memory.abstract_run(config)
    report = nj.memory_report(run.tx, run.params)
    found = breakdown.parameter_groups(config, run.params, report)
    lines = {
        (x["label"], x.get("match")): (x["lr"], x["weight_decay"], x["params"])
        for x in found
    }
    assert lines["matrix", "blocks/0"][:2] == (0.5, 0.0)
    assert lines["matrix", "blocks.*kernel"][:2] == (0.02, 0.5)
    assert lines["vector", "blocks/0"][:2] == (0.5, 0.0)
    assert sum(params for *_, params in lines.values()) == report.total_params
    counts = sum(row.bytes for row in report.rows if row.label == "other")
    assert sum(x["state_bytes"] for x in found) == report.total_bytes - counts


def test_an_update_in_the_backward_pass_has_the_same_groups_and_links():
    embed = lambda rest, batch: batch["x"] @ rest["in"]["kernel"]
    block = lambda layer, x: (
        x + jnp.tanh(x @ layer["up"]["kernel"] + layer["bias"][None])
    )
    head = lambda rest, x, batch: jnp.mean((x @ rest["out"]["kernel"]) ** 2)
    key = jax.random.key(0)
    params = {
        "blocks": {
            "up": {"kernel": jax.random.normal(key, (3, 16, 16)) / 8},
            "bias": jnp.zeros((3, 16)),
        },
        "in": {"kernel": jax.random.normal(key, (8, 16)) / 8},
        "out": {"kernel": jax.random.normal(key, (16, 4)) / 8},
    }
    batch = {"x": jax.random.normal(key, (32, 8))}
    axes = lambda path, shape: nj.MatrixAxes(-2, -1) if "kernel" in path else None
    labels = {
        "blocks": {"up": None, "bias": "vector"},
        "in": "embedding",
        "out": "head",
    }
    config = nj.OptimizerConfig(
        average_horizon=2, average_start_frac=0.0, total_steps=4, cautious_decay=True,
        weight_decay=0.1, weight_decay_schedule="linear", row_floor=0.5,
        fixed_norm=True,
        normalize_rows="normuon", muon_momentum_warmup_steps=2, vector_adam_b2=0.5,
        grad_clip=0.0, ns_steps=2, ns_dtype="float32",
        groups=(
            Group("blocks/bias", lr=0.1), Group("out", optimizer="lion", lr=0.05),
            Group("blocks/up", lr=0.3), Group("in", betas=(0.5, 0.5)),
        ),
    )  # fmt: skip
    tx = nj.build_optimizer(config, params, labels=labels, matrix_axes=axes)
    init, step = update_in_backward(embed, block, head, tx)

    def loss(params):
        x = embed(params, batch)
        for layer in range(3):
            x = block(jax.tree.map(lambda y, i=layer: y[i], params["blocks"]), x)
        return head(params, x, batch)

    updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    got, got_state, _ = jax.jit(step)(params, init(params), batch)
    chex.assert_trees_all_close(got, expected, atol=1e-5)
    chex.assert_trees_all_close(got_state, state, atol=1e-5)
