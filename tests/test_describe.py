"""`describe` says what `init` does, and is believed only where the state agrees."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import nanochat_jax as nj

PARAMS = {
    "embed": {"embedding": jnp.ones((64, 32))},
    "attn": {
        "query": {"kernel": jnp.ones((32, 4, 8)), "bias": jnp.ones((4, 8))},
        "out": {"kernel": jnp.ones((4, 8, 32)), "bias": jnp.ones(32)},
    },
    "up": {"kernel": jnp.ones((32, 128))},
    "words_map": {"kernel": jnp.ones((32, 64))},
    "steps": 3,
}


def by_path(description):
    return {leaf.path: leaf for leaf in description.leaves}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rank", [None, 8])
def test_every_leaf_is_there_with_view_storage_and_bytes(bits, rank):
    tx = nj.muon(0.02, bits=bits, rank=rank, min_size=1)
    leaves = by_path(nj.describe(tx, PARAMS))
    assert len(leaves) == len(jax.tree.leaves(PARAMS))
    assert (
        leaves["attn/query/kernel"].view == leaves["attn/out/kernel"].view == (32, 32)
    )
    assert [leaves[f"attn/query/{x}"].label for x in ("kernel", "bias")] == [
        "matrix",
        "vector",
    ]
    assert ("momentum Int8" in leaves["up/kernel"].state) == (bits == 8)
    assert ("basis" in leaves["up/kernel"].state) == (rank is not None)
    assert leaves["up/kernel"].optimizer == ("Muon, GaLore rank 8" if rank else "Muon")
    rates = {leaf.label: leaf.rate for leaf in leaves.values()}
    assert rates == {
        "matrix": "0.02", "vector": "0.003", "embedding": "0.003", "frozen": "",
    }  # fmt: skip
    frozen = leaves["steps"]
    assert (frozen.label, frozen.state, frozen.state_bytes) == ("frozen", "", 0)
    counts = sum(
        x.nbytes for x in jax.tree.leaves(tx.init(PARAMS)) if x.dtype == jnp.int32
    )
    held = sum(x.nbytes for x in jax.tree.leaves(tx.init(PARAMS)))
    assert sum(leaf.state_bytes for leaf in leaves.values()) == held - counts


def test_a_matrix_with_the_shape_of_an_output_layer_is_pointed_out():
    [warning] = nj.describe(nj.muon(0.02), PARAMS).warnings
    assert "words_map/kernel" in warning
    assert '"head"' in warning
    labels = dict.fromkeys(PARAMS) | {"words_map": "head"}
    assert nj.describe(nj.muon(0.02, labels=labels), PARAMS).warnings == ()


def test_reasons_name_who_says_so():
    given = dict.fromkeys(PARAMS) | {"up": nj.MatrixAxes(1, 0)}
    found = by_path(nj.describe(nj.muon(0.02, matrix_axes=given), PARAMS))
    assert (found["up/kernel"].view, found["up/kernel"].reason) == ((128, 32), "given")
    bare = by_path(nj.describe(nj.muon(0.02), {"a": jnp.ones((4, 8))}))
    assert bare["a"].reason.endswith("assumed")


def test_other_chains_show_what_their_state_shows():
    axes = lambda path, shape: nj.MatrixAxes(0, (1, 2)) if len(shape) == 3 else None
    tx = optax.chain(
        nj.as_matrices(nj.quantize_state(nj.momentum(), {"momentum": nj.Int4()}), axes),
        optax.scale(-0.1),
    )
    params = {"a": jnp.ones((64, 8, 16)), "b": jnp.ones((4, 8))}
    leaves = by_path(nj.describe(tx, params))
    assert leaves["a"].view == (64, 128)
    assert leaves["a"].state == "momentum Int4"
    assert (leaves["b"].view, leaves["b"].state) == (None, "momentum float32")
    assert {leaf.label for leaf in leaves.values()} == {""}


def test_it_prints_as_a_table_with_a_line_a_leaf():
    text = str(nj.describe(nj.muon(0.02), PARAMS))
    lines = text.splitlines()
    assert lines[0].split() == [
        "path", "shape", "view", "label", "optimizer", "rate", "state", "reason",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:-1]] == [
        leaf.path for leaf in nj.describe(nj.muon(0.02), PARAMS).leaves
    ]
    assert lines[-1].startswith("warning: ")


def test_schedules_and_traced_rates_are_told():
    rate = lambda tx: by_path(nj.describe(tx, PARAMS))["up/kernel"].rate
    assert rate(nj.muon(optax.linear_schedule(0.5, 0.0, 9))) == (
        "schedule, 0.5 at first"
    )
    injected = optax.inject_hyperparams(nj.muon, static_args=nj.MUON_STATIC)
    assert rate(injected(learning_rate=0.02)) in ("0.02", "traced")


def test_what_a_view_cannot_keep_of_a_sharding_is_said():
    """Heads sharded are the first part of a merged axis; their entries are not."""
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spread = lambda *spec: jax.ShapeDtypeStruct(
        (32, 4, 8), jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )
    tx = nj.as_matrices(nj.momentum(), nj.MatrixAxes(0, (1, 2)))
    kept = nj.describe(tx, {"a": spread("fsdp", "tensor", None)})
    moved = nj.describe(tx, {"a": spread("fsdp", None, "tensor")})
    assert kept.warnings == ()
    assert "'tensor'" in moved.warnings[0]
    where = lambda x: nj.state_sharding(tx, {"a": x}).momentum["a"].spec
    assert where(spread("fsdp", "tensor", None)) == P("fsdp", "tensor")
    # What is left over goes to the first dimension that it divides.
    assert where(spread("fsdp", None, "tensor")) == P(("fsdp", "tensor"), None)
    stacked = jax.ShapeDtypeStruct(
        (2, 4, 8, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "tensor"))
    )
    tx = nj.as_matrices(nj.momentum(), nj.MatrixAxes((-3, -2), -1))
    found = nj.state_sharding(tx, {"a": stacked}).momentum["a"].spec
    assert found == P(None, "tensor", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"bits": 8, "min_size": 10**6},
            "no state of matrices is stored as momentum Int8",
        ),
        ({"rank": 32}, "Muon, GaLore rank 32 projects no matrix"),
        ({"bits": 8, "min_size": 1}, None),
        ({"rank": 8}, None),
        ({"rank": 8, "bits": 8, "min_size": 1, "complement_bits": 2}, None),
        ({"bits": 8, "min_size": 1, "quantize_embeddings": False}, None),
    ],
)
def test_settings_that_change_no_state_are_pointed_out(arguments, said):
    params = {name: PARAMS[name] for name in ("embed", "up", "attn")}
    warnings = nj.describe(nj.muon(0.02, **arguments), params).warnings
    about = [text for text in warnings if "matri" in text]
    assert [text.startswith(str(said)) for text in about] == [True] * (said is not None)


def test_frozen_parameters_are_named_and_numbers_are_not():
    labels = dict.fromkeys(PARAMS) | {"words_map": "frozen"}
    [warning] = nj.describe(nj.muon(0.02, labels=labels), PARAMS).warnings
    assert warning == "frozen, never updated: words_map/kernel."
