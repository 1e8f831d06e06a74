"""What a checkpoint promises: the same bits back, or a refusal that says why."""

import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.lm.checkpoints import store
from nanochat_jax.lm.checkpoints.differences import check_meta
from nanochat_jax.lm.checkpoints.store import Checkpoints


class Codes(NamedTuple):
    codes: Any
    scales: Any


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_state(step: int) -> State:
    """Returns a state with every kind of node and dtype the trainer has."""
    odd = jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40])
    blocks = {
        0: {"w": jnp.full((4, 8), step + 0.5, jnp.bfloat16), "b": None},
        10: {"w": odd},
    }
    codes = Codes(jnp.full((4, 8), step, jnp.int8), jnp.full((4, 1), step / 3))
    packed = Codes(jnp.full((4, 4), step, jnp.uint8), None)
    opt_state = (codes, optax.EmptyState(), optax.MaskedNode(), [packed, {}])
    return State(jnp.int32(step), {"blocks": blocks}, opt_state)


def make_meta(step: int) -> dict[str, Any]:
    return {"step": step, "config": {"lr": 0.1, "betas": [0.9, 0.95]}, "seed": None}


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for got, wanted in leaves:
        assert isinstance(got, jax.Array)
        assert got.dtype == wanted.dtype
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of five saves; for reading only."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep_last=2, keep_every=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, make_state(step), make_meta(step))
    return directory


@pytest.fixture
def run(written, tmp_path):
    """A copy of that run, to be spoilt."""
    return shutil.copytree(written, tmp_path / "copy")


@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_comes_back_bit_by_bit(written, abstract):
    target = jax.eval_shape(lambda: make_state(0)) if abstract else make_state(0)
    assert_same_bits(Checkpoints(written).restore(target), make_state(5))
    assert Checkpoints(written).read_meta() == make_meta(5)


def test_a_leaf_comes_back_where_the_target_is(written):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        make_state(0),
    )
    restored = Checkpoints(written).restore(target)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


def test_the_last_and_the_chosen_steps_are_kept(written):
    assert Checkpoints(written).steps() == [2, 4, 5]
    assert Checkpoints(written).latest_step() == 5
    assert sorted(path.name for path in written.iterdir()) == ["2", "4", "5"]


@pytest.mark.parametrize("step", [2, 4])
def test_the_folder_of_a_step_can_be_opened(written, step):
    checkpoints = Checkpoints(written / str(step))
    assert checkpoints.latest_step() == step
    assert checkpoints.read_meta() == make_meta(step)
    assert_same_bits(checkpoints.restore(make_state(0)), make_state(step))


def test_a_save_is_a_snapshot(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = add({"w": jnp.zeros((500, 1000)), "step": jnp.int32(0)})
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
            for _ in range(10):
                state = add(state)
    for step, value in ((1, 1.0), (2, 11.0)):
        restored = Checkpoints(tmp_path).restore(state, step)
        np.testing.assert_array_equal(restored["w"], value)


def test_a_state_of_another_layout_is_refused_with_all_offenders(written):
    state = make_state(0)
    other = state._replace(
        step=jnp.int8(0),
        params={"blocks": {0: {"w": jnp.zeros((8, 4), jnp.bfloat16)}, 7: state}},
    )
    with pytest.raises(ValueError, match="not that of this model") as error:
        Checkpoints(written).restore(other)
    assert f"{written / '5'}:" in str(error.value)
    for line in (
        "step: stored int32[], wanted int8[]",
        "params/blocks/0/w: stored bfloat16[4,8], wanted bfloat16[8,4]",
        "params/blocks/10/w: stored float32[4], wanted none",
        "params/blocks/7/step: stored none, wanted int32[]",
    ):
        assert line in str(error.value)


def test_at_most_ten_offenders_are_listed(written):
    other = {f"w{i}": jnp.zeros(3) for i in range(20)}
    stored = len(jax.tree.leaves(make_state(0)))
    with pytest.raises(ValueError, match=f"and {stored + 20 - 10} more"):
        Checkpoints(written).restore(other)


def test_integers_are_never_cast_to_floats(written):
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), make_state(0))
    with pytest.raises(ValueError, match=r"codes: stored int8\[4,8\], wanted float32"):
        Checkpoints(written).restore(floats)


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "delete":
        return path.unlink()
    if how == "flip":
        data[len(data) // 2] ^= 1
    return path.write_bytes(data[: len(data) // 2] if how == "truncate" else data)


@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
def test_every_damaged_file_is_found_and_another_step_proposed(
    written, tmp_path, capfd, how
):
    files = [p.relative_to(written) for p in written.glob("5/*/**/*") if p.is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        run = shutil.copytree(written, tmp_path / str(number))
        spoil(run / file, how)
        with pytest.raises(ValueError, match="damaged checkpoint") as error:
            Checkpoints(run).restore(make_state(0))
        assert file.relative_to("5").as_posix() in str(error.value)
        assert str(run / "4") in str(error.value)
        assert "[2, 4]" in str(error.value)
        assert_same_bits(Checkpoints(run / "4").restore(make_state(0)), make_state(4))
    assert not capfd.readouterr().err  # Orbax prints pages when it reads such files


def test_an_emptied_checkpoint_is_reported_as_damaged(run):
    shutil.rmtree(run / "5")
    (run / "5").mkdir()
    for read in (Checkpoints(run).read_meta, lambda: Checkpoints(run).restore({})):
        with pytest.raises(ValueError, match="damaged checkpoint") as error:
            read()
        assert str(run / "5") in str(error.value)


def test_a_full_device_is_not_reported_as_damage(written, monkeypatch):
    def load(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(store.ocp, "load", load)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        Checkpoints(written).restore(make_state(0))


def test_reading_where_nothing_is_creates_nothing(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for directory in (missing, empty):
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.steps() == []
            assert checkpoints.latest_step() is None
            for read in (checkpoints.read_meta, lambda c=checkpoints: c.restore({})):
                with pytest.raises(ValueError, match="no checkpoint is there") as error:
                    read()
                assert str(directory) in str(error.value)
    assert not missing.exists()
    assert not list(empty.iterdir())


def test_reading_leaves_every_file_as_it_is(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(make_state(0))
        checkpoints.read_meta(2)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_step_that_is_not_there_is_refused_with_those_that_are(written):
    with pytest.raises(ValueError, match=r"no checkpoint of step 3.*\[2, 4, 5\]"):
        Checkpoints(written).restore(make_state(0), 3)


def test_an_unfinished_save_is_passed_over_and_then_removed(run):
    unfinished = run / "9.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert unfinished.exists()
        checkpoints.save(9, make_state(9), {})
    assert not unfinished.exists()
    assert_same_bits(Checkpoints(run).restore(make_state(0)), make_state(9))


def test_leaving_by_an_exception_keeps_the_last_save(tmp_path):
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:  # noqa: PT012
        checkpoints.save(1, make_state(1), {})
        raise KeyboardInterrupt
    assert_same_bits(Checkpoints(tmp_path).restore(make_state(0)), make_state(1))


@pytest.mark.parametrize("raised", ["by the next save", "on leaving"])
def test_an_error_of_a_save_in_the_background_is_raised(tmp_path, monkeypatch, raised):
    def fail(directory):
        raise OSError("disk full")

    monkeypatch.setattr(store.checksums, "write", fail)
    with pytest.raises(OSError, match="disk full"), Checkpoints(tmp_path) as run:  # noqa: PT012
        run.save(1, make_state(1), {})
        if raised == "by the next save":
            run.save(2, make_state(2), {})
            pytest.fail("the first save's error was lost")
    assert Checkpoints(tmp_path).steps() == []


def test_a_step_that_is_there_already_is_left_as_it_is(run):
    with Checkpoints(run) as checkpoints:
        checkpoints.save(5, make_state(0), {})
    assert Checkpoints(run).read_meta() == make_meta(5)
    assert_same_bits(Checkpoints(run).restore(make_state(0)), make_state(5))


def test_a_run_does_not_write_below_the_steps_of_another(run):
    checkpoints = Checkpoints(run)
    checkpoints.check_start(5)
    with pytest.raises(ValueError, match=r"starts at step 3.*there: \[4, 5\]"):
        checkpoints.check_start(3)
    with pytest.raises(ValueError, match="later checkpoints"), checkpoints:
        checkpoints.save(3, make_state(3), {})
    assert checkpoints.steps() == [2, 4, 5]


def test_meta_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"), Checkpoints(tmp_path / "a") as run:
        run.save(1, make_state(1), {"dtype": object()})
    assert not Checkpoints(tmp_path / "a").steps()


@pytest.mark.parametrize("keep", [{"keep_last": 0}, {"keep_every": 0}])
def test_keeping_nothing_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpoints(tmp_path, **keep)


def test_equal_meta_passes_also_after_json():
    check_meta({"shape": [1, 2], "a": {"1": 0}}, {"shape": (1, 2), "a": {1: 0}})


def test_different_meta_is_refused_with_every_key():
    stored = {"lr": 0.1, "data": {"hash": "a", "name": "x"}, "gone": None, "same": 1}
    current = {"lr": 0.2, "data": {"hash": "b", "name": "x"}, "new": 3, "same": 1}
    with pytest.raises(ValueError, match="other settings") as error:
        check_meta(stored, current)
    for line in (
        "lr: stored 0.1, now 0.2",
        "data.hash: stored 'a', now 'b'",
        "gone: stored None, now none",
        "new: stored none, now 3",
    ):
        assert line in str(error.value)
    assert "same" not in str(error.value)
    assert "data.name" not in str(error.value)
    check_meta(stored, current, ignore=("lr", "data.hash", "gone", "new"))


SAVE_FOR_EVER = """
    import itertools, sys
    import jax, jax.numpy as jnp
    jax.config.update("jax_platforms", "cpu")
    from nanochat_jax.lm.checkpoints.store import Checkpoints

    with Checkpoints(sys.argv[1], keep_last=2) as checkpoints:
        for step in itertools.count(1):
            checkpoints.save(step, {"w": jnp.full((1000, 1000), step)}, {"step": step})
"""


@pytest.mark.parametrize("delay", [0.0, 0.017])  # of a second, in a save of 0.1
def test_a_run_killed_while_saving_leaves_whole_checkpoints(tmp_path, delay):
    command = [sys.executable, "-c", textwrap.dedent(SAVE_FOR_EVER), str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 120
        while len(Checkpoints(tmp_path).steps()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest_step()
    restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((1000, 1000), jnp.int32)})
    np.testing.assert_array_equal(restored["w"], step)
    assert checkpoints.read_meta() == {"step": step}
