"""What is predicted that devices send is what compiled programs have them send."""

import dataclasses

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm.model import (
    activation_sharding,
    build_optimizer,
    gpt,
    next_token_loss,
    param_sharding,
)
from nanochat_jax.lm.planning.hlo_collectives import KINDS, collectives
from nanochat_jax.lm.planning.step_traffic import step_traffic
from nanochat_jax.lm.planning.update_traffic import update_traffic
from nanochat_jax.transforms.scheduling import groups

SMALL = {
    "dim": 64, "n_layers": 4, "n_heads": 8, "ffn_mult": 4.0, "vocab_size": 128,
    "max_seq_len": 32, "batch_size": 8, "dataset": "synthetic", "ns_dtype": "bfloat16",
    "weight_tied": False, "loss_chunk": 0,
}  # fmt: skip


def place(sizes, **values):
    config = Config(**SMALL | values, mesh=sizes)
    graphdef, params = gpt.abstract_model(config)
    return (
        config,
        graphdef,
        param_sharding.place(params, param_sharding.make_mesh(sizes), config),
    )


def sent_by(config, compiled):
    """Bytes that a device sends, by kind; what is in the loop over layers, L times."""
    sent = dict.fromkeys(KINDS, 0)
    for found in collectives(compiled.as_text()):
        times = config.n_layers if found.in_loop else 1
        sent[found.kind] += times * found.sent_bytes
    return sent


def gradient(config, graphdef, params):
    """The compiled loss and gradient, placed as the trainer does."""
    shape = (config.batch_size, config.sequence + 1)
    place = params["embed"]["embedding"].sharding.mesh
    where = activation_sharding.batch_sharding(place, shape)
    batch = jax.ShapeDtypeStruct(shape, "int32", sharding=where)
    loss = lambda params, batch: next_token_loss(graphdef, params, batch)
    out = (NamedSharding(place, P()), jax.tree.map(lambda x: x.sharding, params))
    with activation_sharding.using(place):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=out)
        return step.lower(params, batch).compile()


def predicted(rows):
    sent = dict.fromkeys(KINDS, 0)
    for row in rows:
        sent[row.kind] += row.sent_bytes
    # Compilers for the CPU reduce in full and scatter after, which sends twice as much.
    sent["all-reduce"] += 2 * sent.pop("reduce-scatter")
    return sent


@pytest.mark.parametrize("scan", [False, True])
def test_fsdp_sends_what_is_predicted(scan):
    config, graphdef, params = place({"fsdp": 8}, scan_layers=scan, remat=scan)
    rows = step_traffic(config, params)
    found, wanted = sent_by(config, gradient(config, graphdef, params)), predicted(rows)
    assert found.pop("reduce-scatter") == found.pop("collective-permute") == 0
    for kind in ("all-gather", "all-reduce", "all-to-all"):
        assert found[kind] == pytest.approx(wanted[kind], rel=0.01)


def test_a_mesh_of_three_axes_sends_about_what_is_predicted():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    config, graphdef, params = place(sizes, scan_layers=True, remat=True)
    rows = step_traffic(config, params)
    found, wanted = sent_by(config, gradient(config, graphdef, params)), predicted(rows)
    assert sum(found.values()) == pytest.approx(sum(wanted.values()), rel=0.2)


def updated(config, params):
    """The collectives of the compiled update; norms and the like are left out."""
    tx = build_optimizer(config, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        nj.state_sharding(tx, params),
    )
    update = jax.jit(tx.update).lower(params, state, params).compile()
    return [x for x in collectives(update.as_text()) if x.bytes > 256]


def assert_as_predicted(found, rows):
    wanted = predicted(rows)
    for kind in wanted:
        sent = sum(x.sent_bytes for x in found if x.kind == kind)
        assert sent == wanted[kind], kind


GALORE = {"use_galore": True, "galore_rank": 16}
INT8 = {"use_8bit_optim": True, "quant_block_size": 32, "quant_min_size": 1}
UPDATES = [
    ({"fsdp": 8}, INT8),
    ({"data": 2, "fsdp": 4}, {}),
    pytest.param({"fsdp": 8}, GALORE, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, GALORE | INT8, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 4}, GALORE, marks=pytest.mark.slow),
    pytest.param(
        {"fsdp": 8}, GALORE | {"galore_residual": 0.0}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("sizes", "values"), UPDATES, ids=str)
def test_an_update_sends_what_is_predicted(sizes, values):
    config, _, params = place(sizes, **values)
    rows = [row for row in update_traffic(config, params) if row.every == 1]
    found = [x for x in updated(config, params) if not x.in_branch]
    # Groups of matrices take their turns in loops that run once.
    assert_as_predicted(found, rows)
    exchanges = [x for x in found if x.kind == "all-to-all"]
    assert len(exchanges) == sum(x.count for x in rows if x.kind == "all-to-all")


def test_a_group_is_sent_whole(monkeypatch):
    config, _, params = place({"fsdp": 8})
    square = 4 * config.dim**2
    # All 16 square matrices are one group, and half of the bytes would make two.
    monkeypatch.setattr(groups, "CPU_GROUP_BYTES", 16 * square // 8)
    rows, found = update_traffic(config, params), updated(config, params)
    assert_as_predicted(found, rows)
    exchanges = [x for x in found if x.kind == "all-to-all"]
    assert len(exchanges) == sum(x.count for x in rows if x.kind == "all-to-all")


def test_low_rank_and_a_change_of_basis_send_what_is_predicted():
    """Where each leaf has a state of its own, since layers are updated apart."""
    values = {"scan_layers": True, "grad_clip": 0.0, "update_in_backward": True}
    config, _, params = place({"fsdp": 8}, galore_update_freq=5, **GALORE)
    config = dataclasses.replace(config, **values)
    block = params["blocks"][0]
    # Of each shape one, as those of one shape take turns in a loop.
    params = {
        "query": block["attention"]["query"]["kernel"],
        "gate": block["ffn"]["gate"]["kernel"],
        "down": block["ffn"]["down"]["kernel"],
    }
    rows, found = update_traffic(config, params), updated(config, params)
    assert_as_predicted(
        [x for x in found if not x.in_branch], [row for row in rows if row.every == 1]
    )
    found = [x for x in found if x.in_branch]
    assert_as_predicted(found, [row for row in rows if row.every == 5])
    short, long, rank = 64, 256, 16
    whole = 4 * short * long // 8
    assert max(x.bytes for x in found) == max(whole, 4 * rank * long)
