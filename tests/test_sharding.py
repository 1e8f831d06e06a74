"""Where state belongs on a mesh; what needs several devices has a process of its own.

An abstract mesh has sizes and no devices, which is all that placement is reckoned from.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import nanochat_jax as nj
from nanochat_jax.optimizer.sharding import shardings_of
from nanochat_jax.transforms.scheduling import groups as trees
from nanochat_jax.transforms.sharding import specs

HERE = Path(__file__).parent
FILES = sorted((HERE / "eight_devices").glob("test_*.py"))
MESH = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
WIDE, TALL = (64, 128), (128, 64)


def on(*axes, mesh=MESH):
    return NamedSharding(mesh, P(*axes))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_with_eight_devices(path, request):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(HERE.parent)}
    marked = ["-m", request.config.option.markexpr]  # slow tests only if asked for
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [*marked, str(path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def place(tx, shape=WIDE, sharding=None):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return nj.state_sharding(tx, params, {"w": sharding or on("fsdp", "tensor")})


def int8(inner, *fields, block=16):
    return nj.quantize_state(inner, dict.fromkeys(fields, nj.Int8(block)), min_size=1)


@pytest.mark.parametrize(
    "inner", [nj.momentum(), optax.scale_by_adam(), optax.scale_by_lion()]
)
def test_what_is_shaped_as_a_parameter_is_sharded_as_it(inner):
    state = jax.tree.leaves(place(inner))
    assert {s.spec for s in state} - {P()} == {P("fsdp", "tensor")}


def test_counts_and_hyperparameters_are_replicated():
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    state = place(tx)
    assert state.count.spec == state.hyperparams["learning_rate"].spec == P()
    assert state.inner_state[0].mu["w"].spec == P("fsdp", "tensor")


def test_accumulated_gradients_and_the_state_below_are_placed():
    state = place(optax.MultiSteps(nj.momentum(), 2))
    assert state.acc_grads["w"].spec == P("fsdp", "tensor")
    assert state.inner_opt_state.momentum["w"].spec == P("fsdp", "tensor")


@pytest.mark.parametrize(
    "codec", [nj.Int8(16), nj.Int4(16), nj.Normal4(16), nj.Dynamic8(16)]
)
def test_codes_and_scales_are_sharded_as_what_they_encode(codec):
    tx = nj.quantize_state(nj.momentum(), {"momentum": codec})
    stored = place(tx).inner.momentum["w"]
    assert [s.spec for s in jax.tree.leaves(stored)] == [P("fsdp", "tensor")] * 2


def test_scales_that_the_devices_do_not_divide_are_sharded_by_rows():
    stored = place(int8(nj.momentum(), "momentum", block=128)).inner.momentum["w"]
    assert stored.codes.spec == P("fsdp", "tensor")
    assert stored.scales.spec == P(("fsdp", "tensor"), None)


@pytest.mark.parametrize("shape", [WIDE, TALL, (64, 64)])
def test_low_rank_state_keeps_the_axes_that_survive(shape):
    state = place(nj.galore(nj.momentum(), 6), shape)
    short, long = ("fsdp", "tensor") if shape != TALL else ("tensor", "fsdp")
    assert state.basis["w"].spec == P((short, long), None)
    # Four devices do not divide six rows, two do.
    wanted = P(None, (long, short)) if short == "fsdp" else P(short, long)
    assert state.inner.momentum["w"].spec == wanted


def test_axes_of_what_does_not_survive_go_to_a_dimension_they_divide():
    plain = place(nj.galore(nj.momentum(), 6), sharding=on("fsdp", None))
    assert plain.basis["w"].spec == P("fsdp", None)
    assert plain.inner.momentum["w"].spec == P(None, "fsdp")  # four do not divide six
    odd = specs.derived((5, 7), WIDE, on("fsdp", "tensor"))
    assert odd.spec == P(None, None)


def test_stored_low_rank_state_is_placed_as_it_is_in_full():
    tx = int8(nj.galore(nj.momentum(), 8), "momentum", "basis")
    state = place(tx, TALL, on("fsdp", None))
    specs = lambda node: [where.spec for where in jax.tree.leaves(node)]
    assert specs(state.inner.basis["w"]) == [P("fsdp", None)] * 2
    assert specs(state.inner.inner.momentum["w"]) == [P(None, "fsdp")] * 2


@pytest.mark.parametrize("axes", [("fsdp",), ("fsdp", "tensor"), (("fsdp", "tensor"),)])
def test_batches_of_matrices_keep_their_axes(axes):
    sharding = on(*axes)
    state = place(nj.galore(nj.momentum(), 8), (16, 64, 128), sharding)
    used, *_ = specs.axes_of(sharding, 3)
    for leaf in (state.basis["w"], state.inner.momentum["w"]):
        assert specs.axes_of(leaf, 3)[0][: len(used)] == used


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_8bit_optim": True},
        {"use_8bit_optim": True, "quant_bits": 4},
        {"use_8bit_optim": True, "quantize_embeddings": True, "fallback": "lion"},
        {"use_galore": True},
        {"use_galore": True, "galore_residual": 0.0},
        {"use_galore": True, "use_8bit_optim": True},
        {"use_galore": True, "use_8bit_optim": True, "quant_bits": 4},
    ],
    ids=str,
)
def test_a_device_holds_an_eighth_of_every_variants_state(kwargs):
    mesh = AbstractMesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shapes = {
        "embed": (50304, 768), "query": (768, 768), "gate": (768, 2064),
        "down": (2064, 768), "gain": (768,),
    }  # fmt: skip
    rows = NamedSharding(mesh, P("fsdp"))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        for name, shape in shapes.items()
    }
    config = nj.OptimizerConfig(galore_rank=192, **kwargs)
    tx = nj.build_optimizer(config, params)
    state, shardings = jax.eval_shape(tx.init, params), nj.state_sharding(tx, params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert nj.bytes_per_device(state) == total  # without shardings, all of it
    assert nj.bytes_per_device(placed) <= 1.03 * total / 8


@pytest.mark.parametrize(
    ("shape", "count", "sizes"),
    [((4, 4), 20, [16, 4]), ((12, 4, 4), 5, [2, 2, 1]), ((64, 64), 9, [8, 1])],
)
def test_groups_have_as_many_matrices_for_each_device(shape, count, sizes):
    """Up to 128 bytes for each of eight devices, but one matrix for each at least."""
    leaves = [jnp.zeros(shape)] * count
    groups = trees.group_by_shape(leaves, max_bytes=128, devices=8)
    assert [len(group) for group in groups] == sizes


def test_parameters_without_a_usable_sharding_are_all_named():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=r"(?s)'a'\]: None.*'b'\]: P.*device_put"):
        nj.state_sharding(nj.momentum(), params, {"b": P(), "c": on()})
    two = {"a": on(), "b": on(mesh=AbstractMesh((8,), ("fsdp",))), "c": on()}
    with pytest.raises(ValueError, match="on one mesh"):
        nj.state_sharding(nj.momentum(), params, two)
    with pytest.raises(ValueError, match="no parameters"):
        nj.distribute(nj.momentum(), {})


def test_shardings_of_parameters_on_one_device_are_of_no_use():
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=on("fsdp"))
    assert shardings_of({"a": shape, "b": None}) == {"a": on("fsdp"), "b": None}
    assert shardings_of({"a": shape, "b": jnp.ones(3)}) is None
    assert shardings_of({"a": jnp.ones(3)}) is None
