"""Updates of sharded parameters are those of the parameters in one place."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from variants import VARIANTS, build, leaves, make_mesh, shardings

import nanochat_jax as nj
from nanochat_jax.numerics import newton_schulz, zolotarev
from nanochat_jax.polynomials import ZOLOTAREV
from nanochat_jax.transforms import restacked

PLACES = [("8", AxisType.Auto), ("4x2", AxisType.Explicit), ("2x2x2", AxisType.Auto)]
# Those that between them compile everything once.
QUICK = {("muon", "8"), ("galore_8bit", "4x2"), ("galore_8bit", "2x2x2")}
CASES = [
    pytest.param(
        name, *place, marks=[] if (name, place[0]) in QUICK else pytest.mark.slow
    )
    for name in VARIANTS
    for place in PLACES
]


def assert_close(x, y, atol=1e-5):
    chex.assert_trees_all_close(jax.device_get(x), jax.device_get(y), atol=atol, rtol=0)


def assert_placed(tree, wanted):
    jax.tree.map(
        lambda x, s: chex.assert_equal(x.sharding.is_equivalent_to(s, x.ndim), True),
        tree,
        wanted,
    )


@functools.cache
def unsharded(variant):
    """Returns updates of three steps, with two changes of basis, and the state."""
    tx = build(variant, leaves(0))
    update, state, updates = jax.jit(tx.update), tx.init(leaves(0)), []
    for step in range(1, 4):
        new, state = update(leaves(step), state, leaves(0))
        updates.append(new)
    return updates, state


@pytest.mark.parametrize(("variant", "mesh", "kind"), CASES)
def test_sharded_updates_equal_unsharded_ones(variant, mesh, kind):
    """Normal gradients have flat spectra, whose bases turn with every rounding."""
    wanted, after = unsharded(variant)
    placed = shardings(make_mesh(mesh, kind))
    params = jax.device_put(leaves(0), placed)
    tx = build(variant, params)
    where = nj.state_sharding(tx, params)
    # With the mesh in the context, and without.
    where_it_runs = jax.tree.leaves(placed)[0].mesh
    with jax.set_mesh(where_it_runs) if mesh != "8" else contextlib.nullcontext():
        state, update = nj.init_sharded(tx, params), jax.jit(tx.update)
        for step, updates in enumerate(wanted, start=1):
            grads = jax.device_put(leaves(step), placed)
            found, state = update(grads, state, params)
            largest = max(abs(x).max() for x in jax.tree.leaves(updates))
            assert_close(found, updates, 1e-5 * float(largest))
    assert_placed((found, state), (placed, where))
    # An entry on the edge between two codes may get the other one.
    decode = lambda state: nj.dequantize(jax.tree.map(jnp.asarray, state))
    state = restacked(jax.device_get(state), after)
    assert_close(decode(state), decode(after), 5e-3)


WIDE = {"galore_rank": 64, "quant_block_size": 128}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["muon", "muon_8bit", "galore", "galore_8bit"])
def test_updates_of_wide_matrices_equal_unsharded_ones(variant):
    """Of width 256, one of each shape for each device; bases change twice."""
    shapes = {"q": (256, 256), "u": (256, 512)}
    draw = lambda seed: {
        f"{name}_{i}": {"kernel": jnp.float32(draws.normal(size=shape))}
        for draws in [np.random.default_rng(seed)]
        for name, shape in shapes.items()
        for i in range(8)
    }
    placed = jax.tree.map(lambda _: NamedSharding(make_mesh("8"), P("fsdp")), draw(0))
    params = jax.device_put(draw(0), placed)
    one, tx = build(variant, draw(0), **WIDE), build(variant, params, **WIDE)
    plain, state = one.init(draw(0)), nj.init_sharded(tx, params)
    plain_update, update = jax.jit(one.update), jax.jit(tx.update)
    for step in range(1, 4):
        wanted, plain = plain_update(draw(step), plain, draw(0))
        grads = jax.device_put(draw(step), placed)
        found, state = update(grads, state, params)
        largest = max(abs(x).max() for x in jax.tree.leaves(wanted))
        assert_close(found, wanted, 1e-5 * float(largest))


SPECS = [
    P("fsdp", None), P(None, "fsdp"), P(("tensor", "fsdp"), None), P("tensor", "fsdp"),
    P("data", ("fsdp", "tensor")), P(None, None),
]  # fmt: skip


@pytest.mark.parametrize("max_matrix_bytes", [1 << 30, 0])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_matrices_are_orthogonalised_wherever_they_lie(shape, max_matrix_bytes):
    """Stacks that fill no mesh evenly, and batches that are sharded themselves."""
    mesh = make_mesh("2x2x2")
    where = {str(spec): NamedSharding(mesh, spec) for spec in SPECS}
    where["batch"] = NamedSharding(mesh, P("data", "tensor"))
    x = {name: np.random.default_rng(0).normal(size=shape) for name in where}
    x["batch"] = np.random.default_rng(1).normal(size=(2, *shape))
    x = jax.tree.map(jnp.float32, x)
    tx = nj.orthogonalize(dtype="float32", max_matrix_bytes=max_matrix_bytes)
    tx = nj.distribute(tx, where)
    found, _ = jax.jit(tx.update)(jax.device_put(x, where), tx.init(x))
    assert_close(found, jax.tree.map(newton_schulz, x))
    assert_placed(found, where)


def test_large_matrices_are_iterated_on_as_asked_for():
    """The short side, 16, is over eight devices and the long one is no multiple."""
    where = {"w": NamedSharding(make_mesh("8"), P(None, "fsdp"))}
    x = {"w": jnp.float32(np.random.default_rng(0).normal(size=(27, 16)))}
    aol = {"polynomials": nj.POLYNOMIALS["aol"], "form": "standard"}
    tx = nj.distribute(nj.orthogonalize(ZOLOTAREV[3], max_matrix_bytes=0), where)
    found, _ = jax.jit(tx.update)(jax.device_put(x, where), tx.init(x))
    assert_close(found["w"], zolotarev(x["w"], ZOLOTAREV[3]), 1e-4)
    for options in ({"form": "gram"}, aol, {"dtype": "bfloat16"}):
        options = {"dtype": "float32"} | options
        tx = nj.distribute(nj.orthogonalize(max_matrix_bytes=0, **options), where)
        found, _ = jax.jit(tx.update)(jax.device_put(x, where), tx.init(x))
        wanted = newton_schulz(x["w"], **options)
        assert_close(
            found["w"], wanted, 0.03 if options["dtype"] == "bfloat16" else 1e-5
        )


def muon(beta=0.9, where=None):
    tx = optax.chain(nj.momentum(beta), nj.orthogonalize(dtype="float32"))
    return tx if where is None else nj.distribute(tx, where)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda where: optax.MultiSteps(muon(where=where), 2),
        lambda where: optax.inject_hyperparams(muon, static_args="where")(0.9, where),
    ],
    ids=["MultiSteps", "inject_hyperparams"],
)
def test_what_optax_wraps_around_works_too(wrap, kind):
    where = {"w": NamedSharding(make_mesh("8", kind), P("fsdp", None))}
    grads = [{"w": leaves(seed)["up"]["kernel"]} for seed in range(2)]
    one, tx = wrap(None), wrap(where if kind == AxisType.Auto else None)
    plain, params = one.init(grads[0]), jax.device_put(grads[0], where)
    state, update = nj.init_sharded(tx, params), jax.jit(tx.update)
    for g in grads:
        wanted, plain = one.update(g, plain, grads[0])
        found, state = update(jax.device_put(g, where), state, params)
    assert_close(found, wanted)


def test_state_can_be_sharded_where_parameters_are_replicated():
    mesh = make_mesh("8")
    rows, whole = (NamedSharding(mesh, spec) for spec in (P("fsdp", None), P()))
    x = {"w": leaves(0)["up"]["kernel"]}
    params, tx = jax.device_put(x, whole), muon(where={"w": rows})
    state = nj.init_sharded(tx, params, {"w": rows})
    updates, state = jax.jit(tx.update)(params, state, params)
    assert_placed(state[0].momentum, {"w": rows})
    assert_close(updates, muon().update(x, muon().init(x))[0])
