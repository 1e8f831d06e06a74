"""State is made where it belongs, and comes back from disk on fewer devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from variants import MESHES, VARIANTS, build, leaves, make_mesh, shardings

import nanochat_jax as nj
from nanochat_jax.lm.checkpoints.store import Checkpoints


def held(tree):
    """Bytes of the live shards on each device."""
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    devices = {shard.device for shard in shards}
    return {
        sum(shard.data.nbytes for shard in shards if shard.device == device)
        for device in devices
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mesh", MESHES)
def test_state_is_made_where_it_belongs(mesh, kind):
    placed = shardings(make_mesh(mesh, kind))
    params = jax.device_put(leaves(0), placed)
    tx, alone = build("galore_8bit", params), build("galore_8bit", leaves(0))
    wanted = nj.state_sharding(tx, params)
    with jax.set_mesh(jax.tree.leaves(placed)[0].mesh):
        states = nj.init_sharded(tx, params), jax.jit(tx.init)(params)
    for state in (nj.init_sharded(tx, params), *states):
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
        assert held(state) == {nj.bytes_per_device(state)}
        assert held(state) == {nj.memory_report(tx, params).device_bytes}
        for x, y in zip(
            jax.tree.leaves(state),
            jax.tree.leaves(alone.init(leaves(0))),
            strict=True,
        ):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def on_devices(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",), (AxisType.Auto,))
    return shardings(mesh)


def abstract(tx, params, placed):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        nj.state_sharding(tx, params, placed),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_eight_devices_restores_on_fewer(variant, tmp_path):
    tx = build(variant, leaves(0))
    draw = np.random.default_rng(0).normal
    fill = lambda x: jnp.asarray(100 * draw(size=x.shape)).astype(x.dtype)
    state = jax.tree.map(fill, tx.init(leaves(0)))
    eight = jax.tree.map(lambda x: x.sharding, abstract(tx, leaves(0), on_devices(8)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.device_put(state, eight), {})
    for count in (4, 2, 1):
        target = abstract(tx, leaves(0), on_devices(count))
        restored = Checkpoints(tmp_path).restore(target)
        for x, y, wanted in zip(
            jax.tree.leaves(restored),
            jax.tree.leaves(state),
            jax.tree.leaves(target),
            strict=True,
        ):
            assert x.sharding == wanted.sharding
            np.testing.assert_array_equal(x, y)
