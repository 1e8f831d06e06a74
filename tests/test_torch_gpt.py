"""The PyTorch model of the benchmark is ours: what it is timed on is equal work."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from nanochat_jax.lm.model import gpt, next_token_loss

torch = pytest.importorskip(
    "torch", reason="torch is missing: `make test-peers` has it"
)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),  # of PyTorch, which are not ours to mend
]
CONFIG = tiny.run_config(n_layers=2)
BATCH = np.random.default_rng(0).integers(0, 48, (3, 17)).astype(np.int32)


@pytest.fixture(scope="module")
def torch_gpt():
    torch.set_num_threads(1)  # threads only wait for each other on arrays this small
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import torch_gpt
    finally:
        sys.path.remove(folder)
    return torch_gpt


@pytest.fixture(scope="module")
def ours():
    """Structure and parameters, every one of which counts: no gain is one."""
    graphdef, params = gpt.init(CONFIG, 0)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noise = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)
    return graphdef, jax.tree.map(noise, params)


def test_equal_weights_give_equal_losses_and_gradients(torch_gpt, ours):
    graphdef, params = ours
    loss, grads = jax.value_and_grad(
        lambda params: next_token_loss(graphdef, params, jnp.asarray(BATCH))
    )(params)
    peer = torch_gpt.GPT(CONFIG).load(jax.tree.map(np.asarray, params))
    their_loss = peer(torch.tensor(BATCH, dtype=torch.long))
    their_loss.backward()
    np.testing.assert_allclose(their_loss.item(), loss, rtol=1e-5)
    wanted = torch_gpt.GPT(CONFIG).load(jax.tree.map(np.asarray, grads))
    for (name, weight), (_, gradient) in zip(
        peer.named_parameters(), wanted.named_parameters(), strict=True
    ):
        np.testing.assert_allclose(
            weight.grad, gradient.detach(), atol=1e-5, rtol=1e-4, err_msg=name
        )


def test_matrices_go_to_muon_and_the_rest_to_adamw(torch_gpt, ours):
    step = torch_gpt.Step(CONFIG, jax.tree.map(np.asarray, ours[1]), BATCH)
    first = step()
    assert first > step() > step()
    muon, adamw = (optimizer.param_groups[0] for optimizer in step.optimizers)
    assert len(muon["params"]) == CONFIG.n_layers * 7
    assert len(adamw["params"]) == 1 + CONFIG.n_layers * 2 + 1


def test_muon_in_float32_is_that_of_pytorch(torch_gpt):
    torch.manual_seed(0)
    for shape in (8, 8), (8, 24), (24, 8):
        start, *grads = torch.randn(4, *shape)
        ends = []
        for muon in torch.optim.Muon, torch_gpt.Float32Muon:
            weight = torch.nn.Parameter(start.clone())
            optimizer = muon([weight], 0.1, weight_decay=0.0, momentum=0.9, ns_steps=4)
            for weight.grad in grads:
                optimizer.step()
            ends.append(weight.detach() - start)
        torch.testing.assert_close(ends[1], ends[0], atol=4e-3, rtol=2e-2)
