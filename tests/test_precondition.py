"""The laws of `precondition`, and of the bases that follow its averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.codecs import BFloat16
from nanochat_jax.transforms import PowerStep, precondition

PARAMS = {"wide": jnp.zeros((8, 24)), "tall": jnp.zeros((2, 24, 8))}
SECOND = nj.Dynamic8(signed=False, zero=False)
SHORT = {
    "momentum": nj.Int8(), "gram_short": nj.Dynamic8(), "basis_short": nj.Int8(),
    "second_moment": SECOND,
}  # fmt: skip
BOTH = SHORT | {"gram_long": nj.Dynamic8(), "basis_long": nj.Int8()}
# One gradient leaves most directions of a long side free, and rounding decides them:
# where two runs are compared on both sides, matrices are square.
SQUARE = {"wide": jnp.zeros((8, 8)), "tall": jnp.zeros((2, 8, 8))}
both_kinds = pytest.mark.parametrize("sides", ["short", "both"])


def grads(step=0, scale=1.0, sides="short"):
    """Gradients whose directions differ in size, and change places on the way."""

    def leaf(i, x):
        m, n = x.shape[-2:]
        key = jax.random.fold_in(jax.random.key(step), i)
        turn = np.random.default_rng(i)
        u, v = (np.linalg.qr(turn.normal(size=(k, k)))[0] for k in (m, n))
        sizes = [1.5 ** -(np.arange(k) % 8) for k in (m, n)]
        if step >= 4:
            sizes = [np.roll(s, 1) for s in sizes]
        noise = np.asarray(jax.random.normal(key, x.shape), np.float64)
        g = (u * sizes[0]) @ noise @ (v * sizes[1]).T
        return jnp.asarray(scale * g, jnp.float32)

    params = PARAMS if sides == "short" else SQUARE
    return {name: leaf(i, x) for i, (name, x) in enumerate(params.items())}


def run(tx, gradients, state=None):
    state = tx.init(gradients[0]) if state is None else state
    out, update = [], jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state)
        out.append(updates)
    return out, state


class Oracle:
    """SOAP before orthogonalisation for one wide matrix, in float64 numpy."""

    def __init__(self, m, n, sides, every):
        self.momentum, self.v = np.zeros((m, n)), np.zeros((m, n))
        self.grams = [np.zeros((m, m)), np.zeros((n, n))]
        self.bases = None
        self.two, self.every, self.count = sides == "both", every, 0

    def rotate(self, x, back=False):
        p, q = self.bases
        q = q if self.two else np.eye(x.shape[1])
        return p @ x @ q.T if back else p.T @ x @ q

    def step(self, g):
        self.momentum = 0.95 * self.momentum + 0.05 * g
        u = 0.95 * self.momentum + 0.05 * g
        if self.bases is not None:
            r = self.rotate(u)
            self.v = 0.9 * self.v + 0.1 * r**2
            out = self.rotate(r / np.sqrt(self.v), back=True)
            u = out * np.linalg.norm(u) / np.linalg.norm(out)
        self.grams[0] = 0.9 * self.grams[0] + 0.1 * g @ g.T
        self.grams[1] = 0.9 * self.grams[1] + 0.1 * g.T @ g
        if self.bases is None:
            self.bases = [np.linalg.eigh(a)[1][:, ::-1] for a in self.grams]
        elif self.count % self.every == 0:
            for side in range(2 if self.two else 1):
                a, p = self.grams[side], self.bases[side]
                order = np.argsort(-np.diag(p.T @ a @ p), kind="stable")
                self.v = np.take(self.v, order, side)
                self.bases[side] = np.linalg.qr(a @ p[:, order])[0]
        self.count += 1
        return u


@pytest.mark.parametrize(("sides", "every"), [("short", 2), ("both", 1)])
def test_it_is_soap_before_orthogonalisation(sides, every):
    gradients = [grads(step, sides=sides) for step in range(8)]
    tx = precondition(nj.momentum(0.95), sides=sides, basis=PowerStep(every))
    out, _ = run(tx, gradients)
    # A tall stack is its transposed matrices.
    for seen in (lambda g: np.asarray(g["wide"]), lambda g: np.asarray(g["tall"][1].T)):
        oracle = Oracle(*seen(gradients[0]).shape, sides, every)
        for updates, g in zip(out, gradients, strict=True):
            expected = oracle.step(seen(g).astype(np.float64))
            atol = 5e-3 * np.abs(expected).max()
            np.testing.assert_allclose(seen(updates), expected, atol=atol)


@both_kinds
def test_turned_gradients_give_turned_updates(sides):
    gradients = [grads(step, sides=sides) for step in range(6)]
    rng = np.random.default_rng(7)
    p, q = (np.linalg.qr(rng.normal(size=(8, 8)))[0].astype("float32") for _ in "pq")
    turn = lambda g: jnp.asarray(p) @ (g @ q if sides == "both" else g)
    tx = precondition(sides=sides, basis=PowerStep(2))
    out, _ = run(tx, [{"w": g["wide"]} for g in gradients])
    turned, _ = run(tx, [{"w": turn(g["wide"])} for g in gradients])
    size = float(jnp.abs(out[-1]["w"]).max())
    helpers.assert_close(turn(out[-1]["w"]), turned[-1]["w"], atol=5e-3 * size)


@both_kinds
def test_norms_are_kept_and_equal_squares_change_nothing(sides):
    tx, plain = precondition(sides=sides, moment_beta=1.0), nj.momentum()
    gradients = [grads(step) for step in range(2)]
    _, state = run(tx, gradients)
    ones = optax.tree.ones_like(state.second_moment)
    updates, _ = run(tx, [grads(2)], state._replace(second_moment=ones))
    expected, _ = run(plain, [*gradients, grads(2)])
    helpers.assert_close(updates[-1], expected[-1], atol=1e-5)
    divided, _ = run(precondition(sides=sides), [*gradients, grads(2)])
    norm = lambda tree: jax.tree.map(lambda x: jnp.linalg.norm(x, axis=(-2, -1)), tree)
    helpers.assert_close(norm(divided[-1]), norm(expected[-1]), rtol=1e-4)
    assert jnp.abs(divided[-1]["wide"] - expected[-1]["wide"]).max() > 0.01


@both_kinds
def test_scale_passes_through_and_a_stack_is_its_matrices(sides):
    tx = precondition(sides=sides, basis=PowerStep(2))
    out, _ = run(tx, [grads(step) for step in range(5)])
    tiny, _ = run(tx, [grads(step, 2.0**-20) for step in range(5)])
    helpers.assert_close(
        jax.tree.map(lambda x: x * 2.0**20, tiny[-1]), out[-1], atol=1e-4
    )
    alone, _ = run(tx, [{"tall": grads(step)["tall"][1]} for step in range(5)])
    helpers.assert_close(alone[-1]["tall"], out[-1]["tall"][1], atol=1e-4)


def test_power_steps_diagonalise_and_the_order_follows_the_eigenvalues():
    a = helpers.matrix_with_spectrum((8, 8), np.ones(8))
    eigenvalues = 2.0 ** -jnp.arange(8.0)
    gram = a @ jnp.diag(eigenvalues) @ a.mT
    follow = jax.jit(PowerStep().follow)
    found = follow(gram, jnp.eye(8))
    assert list(found.order) == list(range(8))  # found anew, not followed
    helpers.assert_close(found.gram, jnp.diag(eigenvalues), atol=1e-4)
    places = [3, 0, 1, 2, 4, 5, 7, 6]
    shuffled = found.basis[:, jnp.asarray(places)]
    found = follow(shuffled.mT @ gram @ shuffled, shuffled)
    assert list(found.order) == [1, 2, 3, 0, 4, 5, 7, 6]
    helpers.assert_close(jnp.abs(found.basis.mT @ a), jnp.eye(8), atol=1e-3)
    other = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    basis = jnp.asarray(other, jnp.float32)
    seen = basis.mT @ gram @ basis
    for _ in range(20):
        basis, seen, _ = follow(seen, basis)
    helpers.assert_close(seen, jnp.diag(eigenvalues), atol=1e-4)
    helpers.assert_close(basis @ seen @ basis.mT, gram, atol=1e-4)


def test_moments_move_with_their_directions():
    """Where two directions change places, so do their mean squares."""
    tx = precondition(nj.momentum(0.0), basis=PowerStep(1), beta=0.5)
    noise = lambda step: jax.random.normal(jax.random.key(step), (4, 64))
    gradient = lambda step, sizes: {"w": jnp.asarray(sizes)[:, None] * noise(step)}
    before, after = [8.0, 4.0, 2.0, 1.0], [8.0, 4.0, 2.0, 64.0]
    _, state = run(tx, [gradient(i, before) for i in range(20)])
    held = jnp.mean(state.second_moment["w"], axis=1)
    _, state = run(tx, [gradient(20, after), gradient(21, after)], state)
    moved = jnp.mean(state.second_moment["w"], axis=1)
    assert jnp.abs(state.basis_short["w"][3, 0]) > 0.98  # the last one leads now
    # The others moved down by one, and their mean squares with them.
    np.testing.assert_allclose(moved[1:], held[:3], rtol=0.5)
    assert (moved[:-1] > moved[1:]).all()


@pytest.mark.parametrize(
    ("kind", "sides"), [("float32", "both"), ("few bits", "short")]
)
def test_zero_and_faulty_gradients_leave_bases_and_moments_finite(kind, sides):
    tx = precondition(sides=sides, basis=PowerStep(1))
    if kind == "few bits":
        tx = helpers.quantized(tx, SHORT if sides == "short" else BOTH)
    zeros = optax.tree.zeros_like(PARAMS)
    faulty = jax.tree.map(lambda x: x.at[..., 0, 0].set(jnp.nan), grads())
    out, state = run(tx, [zeros, grads(), zeros, grads(1), faulty])
    assert not any(jnp.any(x) for x in out[0].values())
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out[:4]))
    assert all(jnp.isnan(x).any() for x in out[4].values())
    plain = nj.dequantize(state)
    for x in jax.tree.leaves(plain._replace(inner=None)):
        assert jnp.isfinite(x).all()
    for p in plain.basis_short.values():
        eye = jnp.broadcast_to(jnp.eye(8), p.shape)
        helpers.assert_close(p.mT @ p, eye, atol=0.03)


def difference(a, b):
    """Relative L2 distance of two trees."""
    square = lambda tree: sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))
    return (square(jax.tree.map(jnp.subtract, a, b)) / square(b)) ** 0.5


@pytest.mark.slow
@both_kinds
def test_few_bits_change_the_update_by_little(sides):
    """A stored basis is not quite orthonormal, nor a stored average symmetric."""
    tx = precondition(sides=sides, basis=PowerStep(2))
    gradients = [grads(step, sides=sides) for step in range(12)]
    exact, _ = run(tx, gradients)
    fields = SHORT if sides == "short" else BOTH
    bases = {name: codec for name, codec in fields.items() if "basis" in name}
    short_floats = dict.fromkeys(fields, BFloat16())
    for codecs, most in [(fields, 0.2), (bases, 0.05), (short_floats, 0.05)]:
        stored, _ = run(helpers.quantized(tx, codecs), gradients)
        assert difference(stored[-1], exact[-1]) < most


def test_resuming_from_a_stored_state_is_exact():
    tx = helpers.quantized(precondition(basis=PowerStep(2)), SHORT)
    gradients = [grads(step) for step in range(6)]
    whole, _ = run(tx, gradients)
    _, state = run(tx, gradients[:3])
    state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
    rest, _ = run(tx, gradients[3:], state)
    helpers.assert_close(rest[-1], whole[-1], atol=0, rtol=0)


@pytest.mark.parametrize(("sides", "most"), [("short", 0.80), ("both", 1.88)])
def test_bytes_of_the_matrices_of_compare_3m(sides, most):
    """In eight bits, one-sided, less than the momentum of Muon in float32."""
    shapes = [(256, 256)] * 4 + [(256, 688)] * 2 + [(688, 256)]
    params = {f"w{i}": jax.ShapeDtypeStruct(s, "float32") for i, s in enumerate(shapes)}
    form = {"block_size": 256, "scale_dtype": "bfloat16"}
    codecs = dict.fromkeys(SHORT if sides == "short" else BOTH, nj.Int8(**form))
    codecs["second_moment"] = nj.Dynamic8(signed=False, zero=False, **form)
    tx = nj.quantize_state(precondition(sides=sides), codecs)
    leaves = lambda tx: jax.tree.leaves(jax.eval_shape(tx.init, params))
    size = lambda tx: sum(x.size * x.dtype.itemsize for x in leaves(tx))
    assert most - 0.03 < size(tx) / size(nj.momentum()) <= most


def test_galore_follows_the_gradient_by_power_steps():
    g = {"w": helpers.matrix_with_spectrum((32, 96), np.arange(1, 33) ** -0.5)}
    best = np.sum(1 / np.arange(1, 9))
    noise = lambda i: 0.02 * jax.random.normal(jax.random.key(i), (32, 96))
    gradients = [{"w": g["w"] + noise(i)} for i in range(4)]
    tx = nj.galore(nj.momentum(0.0), rank=8, basis=PowerStep(1))
    _, state = run(tx, gradients)
    basis = state.basis["w"]
    helpers.assert_close(basis.mT @ basis, jnp.eye(8), atol=1e-5)
    assert float(jnp.sum((basis.mT @ g["w"]) ** 2)) > 0.95 * best


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: precondition(sides="long"), ValueError, "`sides` .*got 'long'"),
        (lambda: precondition(basis=10), TypeError, "`PowerStep`, got 10"),
        (lambda: PowerStep(0), ValueError, "`refresh_every` .*got 0"),
        (
            lambda: precondition().init({"a": jnp.ones(3)}),
            ValueError,
            r"`precondition` needs(.|\n)*\['a'\] has shape \(3,\)",
        ),
    ],
)
def test_messages_say_what_is_required(make, error, message):
    with pytest.raises(error, match=message):
        make()
