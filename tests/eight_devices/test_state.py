"""State is made where it belongs, and comes back from disk on fewer devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from variants import MESHES, VARIANTS, build, leaves, make_mesh, shardings

import nanochat_jax as nj
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.transforms import restacked


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
        plain = alone.init(leaves(0))
        chex.assert_trees_all_equal(restacked(jax.device_get(state), plain), plain)


def on_devices(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",), (AxisType.Auto,))
    return shardings(mesh)


def abstract(variant, count):
    """Shapes of a state on so many devices; on one each leaf has its own."""
    if count == 1:
        return jax.eval_shape(build(variant, leaves(0)).init, leaves(0))
    params = jax.device_put(leaves(0), on_devices(count))
    tx = build(variant, params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        nj.state_sharding(tx, params),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_restores_on_any_number_of_devices(variant, tmp_path):
    """Exactly: of eight devices on fewer, and of one on eight."""
    draw = np.random.default_rng(0).normal
    fill = lambda x: jnp.asarray(100 * draw(size=x.shape)).astype(x.dtype)
    state = jax.tree.map(fill, build(variant, leaves(0)).init(leaves(0)))
    for stored, counts in ((8, (8, 4, 1)), (1, (8, 1))):
        saved = state if stored == 1 else restacked(state, abstract(variant, stored))
        with Checkpoints(tmp_path / str(stored)) as checkpoints:
            checkpoints.save(3, saved, {})
        for count in counts:
            target = abstract(variant, count)
            restored = Checkpoints(tmp_path / str(stored)).restore(target)
            assert jax.tree.structure(restored) == jax.tree.structure(target)
            if count > 1:
                place = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
                assert place(restored) == place(target)
            plain = restacked(jax.device_get(restored), state)
            chex.assert_trees_all_equal(plain, jax.device_get(state))
