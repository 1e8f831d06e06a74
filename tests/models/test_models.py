"""Real models: every leaf right or refused, and every update orthogonal."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr
from judge import Expected, bare, leaves, slashed, verdict

from conftest import RECORDS

FILE = pathlib.Path(__file__).parent / "expected.json"
EXPECTED = {
    name: {path: Expected.parse(text) for path, text in paths.items()}
    for name, paths in json.loads(FILE.read_text()).items()
}
VARIANTS = {
    "muon": {},
    "8-bit": {"bits": 8},
    "galore": {"rank": 4},
    "8-bit galore": {"bits": 8, "rank": 4},
}
# What five quintic steps make of singular values of one half and more.
LOW, HIGH = 0.6, 1.3


def test_the_tree_is_the_one_that_was_read(name, tree):
    shapes = {path: tuple(x.shape) for path, x in leaves(tree.params).items()}
    assert shapes == {path: want.shape for path, want in EXPECTED[name].items()}


def test_the_model_tells_every_leaf(name, tree):
    from nanochat_jax.optimizer.roles import settle

    if tree.model is None and not tree.keeps_classes:
        return  # bare arrays, which the next test reads
    roles = settle(tree.params, matrix_axes=_derived(tree), refuse=False)
    found = _record("model", name, tree.params, roles)
    assert not {path: why for path, why in found.items() if "right" not in why}


def test_module_classes_in_the_tree_tell_every_leaf(name, tree):
    from nanochat_jax.optimizer.roles import settle

    if not tree.keeps_classes:
        return
    roles = settle(tree.params, refuse=False)
    found = _record("classes", name, tree.params, roles)
    assert not {path: why for path, why in found.items() if "right" not in why}


def test_names_tell_right_or_refuse(name, tree):
    from nanochat_jax.optimizer.roles import settle

    params = bare(tree.params)
    found = _record("names", name, params, settle(params, refuse=False))
    assert not {path: why for path, why in found.items() if "wrong" in why}


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_are_orthogonal_in_the_right_view(name, tree, variant):
    tx = _optimizer(name, tree, variant)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree.params)
    gradients = jax.tree.map_with_path(
        lambda path, x: jnp.asarray(_gradient(EXPECTED[name][slashed(path)]), x.dtype),
        params,
    )
    updates, _ = jax.jit(tx.update)(gradients, jax.jit(tx.init)(params), params)
    outside = {}
    for path, update in leaves(updates).items():
        want = EXPECTED[name][path]
        assert np.isfinite(update).all(), path
        if want.label != "matrix":
            continue
        matrices = want.view(np.asarray(update, np.float32))
        values = np.linalg.svd(matrices, compute_uv=False) / _shape_factor(matrices)
        if values.min() < LOW or values.max() > HIGH:
            outside[path] = want.shape, float(values.min()), float(values.max())
    assert not outside


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_is_that_of_matrices_with_two_axes(name, tree, variant):
    import nanochat_jax

    flat, labels = {}, {}
    for path, want in EXPECTED[name].items():
        x = leaves(tree.params)[path]
        flat[path] = x
        labels[path] = want.label
        if want.label == "matrix":
            flat[path] = jax.ShapeDtypeStruct(_two_axes(want), x.dtype)
    last_two = lambda path, shape: nanochat_jax.MatrixAxes(-2, -1)
    options = VARIANTS[variant]
    tx = nanochat_jax.muon(
        1.0, min_size=0, matrix_axes=last_two, labels=labels, **options
    )
    held = _nbytes(_optimizer(name, tree, variant), tree.params)
    assert held == _nbytes(tx, flat)


def _derived(tree):
    """Returns what the model says of its parameters."""
    import nanochat_jax

    return nanochat_jax.matrix_axes(tree.model, *tree.inputs)


def _optimizer(name, tree, variant):
    """Returns a variant as a user makes it, with by hand what nothing tells."""
    import nanochat_jax
    from nanochat_jax.optimizer.roles import settle

    axes = None if tree.model is None else _derived(tree)
    roles = settle(tree.params, matrix_axes=axes, refuse=False)
    if any(role.label == "matrix" and not role.axes for role in roles.values()):
        axes = jax.tree.map_with_path(
            lambda path, _: _by_hand(EXPECTED[name][slashed(path)]), tree.params
        )
    return nanochat_jax.muon(1.0, min_size=0, matrix_axes=axes, **VARIANTS[variant])


def _two_axes(want):
    """Returns the shape of a leaf whose matrices have one axis a side."""
    batch = [want.shape[axis] for axis in want.batch]
    return (*batch, *want.view_shape[1:])


def _by_hand(want):
    import nanochat_jax

    if want.label == "matrix":
        return nanochat_jax.MatrixAxes(want.fan_in, want.fan_out)
    return want.label


def _record(source, name, params, roles):
    """Returns the verdict on each leaf, and keeps it for the summary."""
    found = {}
    for path, x in jax.tree.leaves_with_path(params):
        key, role = slashed(path), roles[keystr(path)]
        want = EXPECTED[name][key]
        found[key] = verdict(role, want)
        RECORDS.append(
            {
                "source": source, "tree": name, "path": key, "shape": list(x.shape),
                "expected": f"{want.label} {want.fan_in}->{want.fan_out}",
                "found": found[key], "reason": role.reason,
            }
        )  # fmt: skip
    return found


def _gradient(want):
    """Returns a random leaf whose matrices are far from singular."""
    key = np.random.default_rng(math.prod(want.shape) + len(want.shape))
    if want.label != "matrix":
        return key.normal(size=want.shape)
    view = want.view(key.normal(size=want.shape))
    left, values, right = np.linalg.svd(view, full_matrices=False)
    values = key.uniform(0.5, 1.0, size=values.shape)
    return want.unview((left * values[:, None, :]) @ right)


def _shape_factor(matrices):
    """Returns the factor of `scale_by_shape("width")`."""
    fan_in, fan_out = matrices.shape[-2:]
    return math.sqrt(max(1.0, fan_out / fan_in))


def _nbytes(tx, params):
    state = jax.eval_shape(tx.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
