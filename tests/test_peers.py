"""Agreement with packages of others, if installed, as by `make test-peers`."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nanochat_jax as nj

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),  # of the peers, which are not ours to mend
]

RANK = 6
SHAPES = [(24, 40), (40, 24)]


def peer(name):
    return pytest.importorskip(
        name, reason=f"{name} is missing: `make test-peers` has it"
    )


@pytest.fixture(scope="module")
def torch():
    return peer("torch")


@pytest.fixture(scope="module")
def bitsandbytes():
    return peer("bitsandbytes.functional")


@pytest.fixture(scope="module")
def galore_torch():
    return peer("galore_torch")


def low_rank(inner, refresh_every=200, **kwargs):
    """GaLore as its authors wrote it: an exact basis, moments kept in the old one."""
    basis = nj.RandomizedSVD(refresh_every, power_iterations=30)
    return nj.galore(inner, RANK, basis=basis, reproject=(), **kwargs)


def gradients(shape, step=0):
    """A gradient whose singular values are apart, so that its basis is definite."""
    rng = np.random.default_rng(step)
    k = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in shape)
    return np.float32((u * 0.7 ** np.arange(k)) @ v.T)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_bitsandbytes_to_the_bit(bitsandbytes, signed):
    theirs = bitsandbytes.create_dynamic_map(signed).numpy()
    ours = np.asarray(nj.Dynamic8(signed=signed).levels, np.float32)
    np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_are_within_one_of_bitsandbytes(torch, bitsandbytes, signed):
    x = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    x = x if signed else x * x
    ours = nj.Dynamic8(256, signed=signed).encode(jnp.asarray(x))
    table = bitsandbytes.create_dynamic_map(signed)
    codes, state = bitsandbytes.quantize_blockwise(
        torch.from_numpy(x), code=table, blocksize=256
    )
    scales = state.absmax.numpy().reshape(ours.scales.shape)
    shares = np.abs(x) / np.repeat(scales, 256, -1)
    apart = np.abs(np.asarray(ours.codes, int) - codes.numpy())
    # Their search is approximate for entries smaller than this.
    assert (apart <= 1)[shares > 1e-4].mean() > 0.998
    # Scales differ by the table's -0.993 where a negative entry sets them, only there.
    blocks = x.reshape(*scales.shape, 256)
    upward = blocks.max(-1) >= -1.0071 * blocks.min(-1)
    np.testing.assert_array_equal(ours.scales[upward], scales[upward])
    np.testing.assert_allclose(ours.scales, scales, rtol=0.0071)
    assert (apart == 0).reshape(blocks.shape)[upward].mean() > 0.95


def test_bitsandbytes_decodes_our_codes_as_we_do(torch, bitsandbytes):
    x = np.random.default_rng(0).normal(size=(8, 1024)).astype(np.float32)
    codec = nj.Dynamic8(256)
    stored = codec.encode(jnp.asarray(x))
    theirs = bitsandbytes.dequantize_blockwise(
        torch.from_numpy(np.array(stored.codes)),
        absmax=torch.from_numpy(np.array(stored.scales).ravel()),
        code=bitsandbytes.create_dynamic_map(),
        blocksize=256,
    )
    np.testing.assert_array_equal(stored.decode(), theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_is_galore_torch_s(torch, galore_torch, shape):
    """Bases may differ by rotation and sign, so what they project to is compared."""
    from galore_torch.galore_projector import GaLoreProjector

    g = gradients(shape)
    projector = GaLoreProjector(RANK, proj_type="std")
    theirs = projector.project_back(projector.project(torch.from_numpy(g), 0))
    tx = low_rank(optax.identity())
    ours, _ = tx.update({"w": jnp.asarray(g)}, tx.init({"w": jnp.asarray(g)}))
    np.testing.assert_allclose(ours["w"], theirs, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_galore_adamw_are_galore_torch_s(torch, galore_torch, shape):
    """Two steps in one basis: moments kept in a new one depend on its signs."""
    lr, scale, betas, eps = 0.01, 0.25, (0.9, 0.999), 1e-12
    parameter = torch.nn.Parameter(torch.zeros(shape))
    settings = {"rank": RANK, "update_proj_gap": 2, "scale": scale, "proj_type": "std"}
    peer_optimizer = galore_torch.GaLoreAdamW(
        [{"params": [parameter], **settings}],
        lr=lr,
        betas=betas,
        eps=eps,
        no_deprecation_warning=True,
    )
    adam = optax.scale_by_adam(*betas, eps)
    tx = optax.chain(
        low_rank(adam, refresh_every=2, scale=scale), optax.scale_by_learning_rate(lr)
    )
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    for step in range(2):
        g = gradients(shape, step)
        parameter.grad = torch.from_numpy(g)
        peer_optimizer.step()
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(
            params["w"], parameter.detach().numpy(), atol=1e-5 * lr, rtol=1e-3
        )
