"""State by owner: what a stack holds is what its members hold apart.

An abstract mesh lays states out; one device can work on them too.
"""

import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import nanochat_jax as nj
from nanochat_jax.transforms import owned, per_leaf, restacked

SHAPES = {"a": (16, 32), "b": (16, 32), "layers": (3, 16, 32)}
MESH = AbstractMesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


class Staggered(nj.RandomizedSVD):
    def is_due(self, count, path, gradient, basis):
        turn = zlib.crc32(path.encode()) % self.refresh_every
        return (count + turn) % self.refresh_every == 0


EVERY_TWO = nj.RandomizedSVD(2)


def build(rule=EVERY_TWO, **codec):
    galore = nj.galore(nj.momentum(), 4, complement=1.0, basis=rule)
    inner = optax.chain(galore, nj.orthogonalize(dtype="float32"))
    codecs = {"momentum": nj.Int8(8, **codec), "basis": nj.Int8(8)}
    return owned(nj.quantize_state(inner, codecs, min_size=100), dtype="float32")


def draw(seed):
    normal = np.random.default_rng(seed).normal
    return {name: jnp.float32(normal(size=shape)) for name, shape in SHAPES.items()}


def placed(tx):
    """The transform on eight devices, and parameters there; nothing is allocated."""
    spec = lambda x: P(*(None,) * (x.ndim - 2), "fsdp", None)
    shardings = jax.tree.map(lambda x: NamedSharding(MESH, spec(x)), draw(0))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        draw(0),
        shardings,
    )
    return nj.distribute(tx, shardings), params


def shapes_of(tx):
    return jax.eval_shape(placed(tx)[0].init, placed(tx)[1])


@pytest.mark.parametrize(
    ("rule", "codec"),
    [(EVERY_TWO, {"stochastic_rounding": True}), (Staggered(2), {})],
    ids=["keys", "paths"],
)
def test_members_of_a_stack_are_updated_as_they_are_apart(rule, codec):
    """With their own random keys, and their own turns to change basis."""
    tx = build(rule, **codec)
    apart = tx.init(draw(0))
    together = restacked(apart, shapes_of(tx))
    update = jax.jit(tx.update)
    for step in range(1, 4):
        wanted, apart = update(draw(step), apart)
        found, together = update(draw(step), together)
        chex.assert_trees_all_close(found, wanted, atol=1e-5)
    again = restacked(together, apart)
    codes = lambda state: state.inner[0].inner.momentum["layers"].codes
    np.testing.assert_array_equal(codes(again), codes(apart))


def test_a_stack_has_an_entry_for_each_matrix_and_fills_the_devices():
    state = shapes_of(build())
    stacks = {stack.members: stack.size for stack in state.stacks}
    assert stacks == {("['a']", "['b']"): 8, ("['layers']",): 8}
    assert state.inner.inner[0].inner.momentum["a"].shape == (8, 4, 32)
    assert isinstance(state.inner.inner[0].inner.momentum["b"], optax.MaskedNode)


def test_entries_are_sharded_and_counts_are_not():
    tx, params = placed(build())
    where = nj.state_sharding(tx, params).inner
    assert where.count.spec == P()
    assert {x.spec for x in jax.tree.leaves(where.inner[0].basis)} == {P("fsdp")}
    report = nj.memory_report(tx, params)
    assert report.matrix_bytes == 8 * sum(
        row.device_bytes for row in report.rows if row.label == "matrix"
    )


def test_a_state_in_stacks_is_described_by_parameter():
    tx, params = placed(build())
    assert str(nj.describe(tx, params)) == str(nj.describe(build(), draw(0)))


def test_any_layout_comes_back_from_any_other():
    tx, draws = build(), np.random.default_rng(0)
    fill = lambda x: jnp.asarray(50 * draws.normal(size=x.shape)).astype(x.dtype)
    state = jax.tree.map(fill, tx.init(draw(0)))
    there = restacked(state, shapes_of(tx))
    chex.assert_trees_all_equal(restacked(there, state), state)
    chex.assert_trees_all_equal(restacked(there, there), there)


def test_a_state_is_kept_leaf_by_leaf_where_that_is_asked_for():
    tx, params = placed(build())
    state = jax.eval_shape(per_leaf(tx).init, params)
    assert jax.tree.structure(state) == jax.tree.structure(build().init(draw(0)))


def test_what_a_stack_cannot_do_is_refused_with_what_to_do():
    tx, grads = build(), draw(1)
    state = restacked(tx.init(draw(0)), shapes_of(tx))
    with pytest.raises(ValueError, match=r"(?s)updated together.*\['b'\].*per_leaf"):
        tx.update({**grads, "b": None}, state)
    with pytest.raises(ValueError, match=r"(?s)not one of that transform.*momentum"):
        restacked(nj.momentum().init(draw(0)), state)
