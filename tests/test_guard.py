"""Which steps are skipped, and what is remembered of the others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.lm.training import guard
from nanochat_jax.lm.training.guard import WINDOW
from nanochat_jax.transforms import apply_if


def watch(losses, norms=None, *, spike_skip=0.0, start=None):
    """Judges one step after another; returns which were taken, and the guard."""
    norms = np.ones_like(losses) if norms is None else norms

    def step(state, seen):
        take, state = guard.judge(state, *seen, spike_skip)
        return state, take

    seen = jnp.stack([jnp.float32(losses), jnp.float32(norms)], axis=1)
    start = guard.init() if start is None else start
    state, taken = jax.jit(lambda start: jax.lax.scan(step, start, seen))(start)
    return np.array(taken), state


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(3.0, 0.1, count)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_counted_and_forgotten(bad):
    losses, norms = noise(20), noise(20, seed=1)
    losses[[4, 5, 9, 18]] = bad
    norms[[5, 6, 19]] = bad
    taken, state = watch(losses, norms)
    skipped = [4, 5, 6, 9, 18, 19]
    assert np.flatnonzero(~taken).tolist() == skipped
    assert (int(state.taken), int(state.skipped)) == (14, 6)
    assert int(state.consecutive_skips) == 2
    _, same = watch(np.delete(losses, skipped), np.delete(norms, skipped))
    chex.assert_trees_all_close(state.mean, same.mean, rtol=1e-6)
    chex.assert_trees_all_close(state.variance, same.variance, rtol=1e-5)


def test_moments_are_those_of_all_steps_at_first():
    losses, norms = noise(WINDOW), 5 * noise(WINDOW, seed=1)
    _, state = watch(losses, norms)
    np.testing.assert_allclose(state.mean, [losses.mean(), norms.mean()], rtol=1e-5)
    np.testing.assert_allclose(state.variance, [losses.var(), norms.var()], rtol=1e-3)


def test_moments_forget_at_the_pace_of_the_window():
    """A step of the level: what is left of the old one falls by 1 - 1/WINDOW."""
    _, state = watch(np.ones(WINDOW))
    _, state = watch(np.full(300, 2.0), start=state)
    left = (1 - 1 / WINDOW) ** 300
    assert float(state.mean[0]) == pytest.approx(2 - left, rel=1e-5)
    assert float(state.variance[0]) == pytest.approx(left * (1 - left), rel=1e-3)


@pytest.mark.parametrize("signal", ["loss", "grad_norm"])
def test_a_spike_is_skipped_in_either_signal_and_a_fall_is_not(signal):
    rows = {"loss": noise(300), "grad_norm": noise(300, seed=1)}
    rows[signal][[50, 200, 250]] = 9.0, 9.0, -3.0
    taken, state = watch(*rows.values(), spike_skip=6.0)
    assert np.flatnonzero(~taken).tolist() == [200]  # at 50 it is too early to tell
    assert int(state.consecutive_skips) == 0
    taken, _ = watch(*rows.values())
    assert taken.all()


def test_ordinary_noise_is_never_a_spike():
    taken, _ = watch(noise(3000), noise(3000, seed=1), spike_skip=6.0)
    assert taken.all()


def test_an_update_that_is_not_taken_is_not_applied():
    grads = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    tx = optax.chain(optax.scale_by_schedule(lambda count: -1.0), optax.identity())
    state = tx.init(grads)
    apply = jax.jit(lambda take: apply_if(take, tx, grads, state, grads))
    chex.assert_trees_all_equal(apply(jnp.bool_(False)), (grads, state))
    params, state = apply(jnp.bool_(True))
    chex.assert_trees_all_equal(params, jax.tree.map(jnp.zeros_like, grads))
    assert int(state[0].count) == 1


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (np.nan, np.inf, "the loss is nan and the gradient norm is inf"),
        (2.0, np.nan, "step 40: the gradient norm is nan. "),
        (9.0, 3.0, "the loss, 9, or the gradient norm, 3, is far above its running"),
    ],
)
def test_a_run_stops_with_what_was_wrong_and_what_to_do(loss, norm, said):
    values = {"loss": loss, "grad_norm": norm, "skipped": 12, "consecutive_skips": 4}
    assert guard.check(values, 40, most=5) == 12
    with pytest.raises(FloatingPointError) as error:
        guard.check(values, 40, most=4)
    assert said in str(error.value)
    for part in ("4 in a row", "`max_skipped_steps`", "of step 36", "--init-from"):
        assert part in str(error.value)
