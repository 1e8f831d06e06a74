"""Placement of an optimizer and its state on a mesh of devices.

The rule, for every transform: an array with the shape of a parameter, or of the
matrices that it is seen as, is sharded like it, a merged axis like the first of its
parts. Other arrays of a parameter keep the mesh axes of the dimensions that survive,
and the rest of the mesh axes go to the first dimension that they divide. Arrays of no
parameter, such as counts, are replicated. So

  * codes are sharded like the array they encode, scales too if as many blocks are on
    each device, else by rows;
  * a basis `[short, r]` is sharded as the parameter's shorter axis, a low-rank momentum
    `[r, long]` as its longer one; by another axis if that one is not sharded.

Where matrices have owners, as `owned` gives them, an array of their state has an entry
for each matrix of a stack, and all mesh axes shard the axis of entries.

An axis that divides none of an array's dimensions is dropped: the array is then on more
devices than the parameter, and nothing else changes.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.tree_util import KeyPath, keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms import (
    Placement,
    is_owned,
    laid_out,
    locate,
    placement,
    record,
    specs,
)


def state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
) -> Any:
    """Returns where each array of `tx`'s state belongs.

    Example:
      >>> mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,))
      >>> rows = jax.NamedSharding(mesh, jax.P("fsdp", None))
      >>> tx = quantize_state(momentum(), {"momentum": Int8()})
      >>> where = state_sharding(tx, {"w": jnp.ones((64, 256))}, {"w": rows})
      >>> where.inner.momentum["w"].codes == rows, where.count.spec == jax.P()
      (True, True)

    Args:
      tx: Transformation whose state to place.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      param_shardings: A tree like `params` of `jax.sharding.NamedSharding`s on one
        mesh; those that `params` have if not given.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`s.

    Raises:
      ValueError: If a parameter has no such sharding, or they are on several meshes.
    """
    shardings = _by_path(params, param_shardings)
    shapes = {keystr(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    mesh = next(iter(shardings.values()))
    state, told = record.recorded_init(tx, params)
    places = locate(state, params)
    owned = [
        keystr(path) + ".inner"
        for path, node in jax.tree.leaves_with_path(state, is_leaf=is_owned)
        if is_owned(node)
    ]

    def place(path: KeyPath, leaf: Any) -> Any:
        name = places[keystr(path)].name
        if name is None:
            return specs.replicated(mesh)
        if name in told.stacks and keystr(path).startswith(tuple(owned)):
            return jax.tree.map(lambda _: told.stacks[name], leaf)
        like, where = shapes[name], shardings[name]
        view = told.views.get(name)
        if view is not None and leaf.shape != like:
            like, where = view.view_shape, specs.viewed(view, where)
        whole = specs.derived(leaf.shape, like, where)
        if not is_quantized(leaf):
            return whole
        return jax.tree.map(lambda x: specs.fit(x.shape, whole), leaf)

    return jax.tree.map_with_path(place, state, is_leaf=is_quantized)


def init_sharded(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
) -> optax.OptState:
    """Returns `tx.init(params)`, each array made where `state_sharding` has it.

    No device holds more than its part at any time; `jax.jit(tx.init)` alone would leave
    full copies on all of them.

    Example:
      >>> mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,))
      >>> rows = jax.NamedSharding(mesh, jax.P("fsdp", None))
      >>> params = jax.device_put({"w": jnp.ones((64, 256))}, rows)
      >>> init_sharded(momentum(), params).momentum["w"].sharding == rows
      True

    Args:
      tx: Transformation whose state to make.
      params: Parameters, as arrays.
      param_shardings: As for `state_sharding`.

    Returns:
      The state.

    Raises:
      ValueError: As `state_sharding`.
    """
    shardings = state_sharding(tx, params, param_shardings)
    return jax.jit(tx.init, out_shardings=shardings)(params)


def distribute(
    tx: optax.GradientTransformation, param_shardings: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` for parameters that are sharded over the devices of a mesh.

    Inside, `orthogonalize` shares its matrices out among the devices, `galore` finds
    its bases without gathering gradients, and `sequence` reckons with what is on one
    device. Updates come back sharded as given here, and the state as `state_sharding`
    has it. The updates are otherwise those of `tx`. It belongs outermost;
    `build_optimizer` puts it there if the parameters it is given are on several
    devices. On a mesh of Explicit axes the types of arrays tell all this, and it is not
    needed.

    The shardings may be other than the parameters' own: with parameters replicated over
    an axis and updates sharded over it, each device holds its part of the state only.

    Example:
      >>> mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,))
      >>> shardings = {"w": jax.NamedSharding(mesh, jax.P("fsdp", None))}
      >>> params = jax.device_put({"w": jnp.ones((64, 256))}, shardings)
      >>> tx = distribute(optax.chain(momentum(), orthogonalize()), shardings)
      >>> updates, state = jax.jit(tx.update)(params, init_sharded(tx, params), params)

    Args:
      tx: Transformation of the whole tree of parameters.
      param_shardings: A tree like the parameters of `jax.sharding.NamedSharding`s on
        one mesh.

    Returns:
      A transformation with the updates and the state of `tx`.

    Raises:
      ValueError: As `state_sharding`.
    """
    tx = optax.with_extra_args_support(tx)
    known = _by_path(param_shardings, param_shardings)

    def init(params: optax.Params) -> optax.OptState:
        with laid_out(placement=Placement.of(params, param_shardings)):
            return tx.init(params)

    def place_state(state: optax.OptState, params: optax.Params) -> optax.OptState:
        owned = any(map(is_owned, jax.tree.leaves(state, is_leaf=is_owned)))
        with laid_out(per_leaf=not owned):
            wanted = state_sharding(tx._replace(init=init), params, param_shardings)
        flat = jax.tree.leaves_with_path(wanted)
        return _constrain(state, {keystr(path): s for path, s in flat})

    def init_fn(params: optax.Params) -> optax.OptState:
        return place_state(init(params), params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        whole: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        where = Placement.of(like, param_shardings)
        updates, state = tx.update(
            updates, state, params, placement=where, whole=whole, **extra_args
        )
        state = place_state(state, like if whole is None else whole)
        return _constrain(updates, known), state

    return tx._replace(init=init_fn, update=update_fn)


def shardings_of(params: optax.Params) -> Any:
    """Returns the shardings of parameters that are on several devices of one mesh.

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree like `params` of `NamedSharding`s, or `None` if a parameter has none or all
      are on one device.
    """
    found = jax.tree.map(_named_sharding, params)
    spread = any(s.mesh.size > 1 for s in jax.tree.leaves(found))
    complete = len(jax.tree.leaves(found)) == len(jax.tree.leaves(params))
    return found if spread and complete else None


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree.

    Example:
      >>> bytes_per_device({"w": jnp.ones((64, 256), jnp.bfloat16)})
      32768

    Args:
      tree: Arrays, or `jax.ShapeDtypeStruct`s with shardings; one without a sharding
        counts whole.
    """

    def held(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(held(x) for x in jax.tree.leaves(tree))


def _named_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _constrain(tree: Any, shardings: Mapping[str, NamedSharding]) -> Any:
    """Returns a tree, or a part of one, with the shardings of its arrays by path."""

    def place(path: KeyPath, x: Any) -> Any:
        where = specs.fit(x.shape, shardings[keystr(path)])
        return placement.constrain(x, where)

    return jax.tree.map_with_path(place, tree)


def _by_path(params: Any, param_shardings: Any) -> dict[str, NamedSharding]:
    """Returns the shardings of parameters by path, or says which are unusable."""
    if param_shardings is None:
        param_shardings = jax.tree.map(_named_sharding, params)
    given = {keystr(p): x for p, x in jax.tree.leaves_with_path(param_shardings)}
    wanted = [keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    wrong = [
        f"  {name}: {given.get(name)}"
        for name in wanted
        if not isinstance(given.get(name), NamedSharding)
    ]
    if wrong or not wanted:
        raise ValueError(
            "every parameter needs a `jax.sharding.NamedSharding`, got\n"
            + "\n".join(wrong or ["  no parameters"])
            + "\nGive `param_shardings`, or place the parameters with "
            "`jax.device_put(params, shardings)`."
        )
    meshes = {given[name].mesh for name in wanted}
    if len(meshes) > 1:
        raise ValueError(
            "all parameters must be on one mesh, got\n"
            + "\n".join(f"  {mesh}" for mesh in meshes)
            + "\nPlace them with `jax.device_put(params, shardings)`."
        )
    return {name: given[name] for name in wanted}
