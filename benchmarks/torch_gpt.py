"""Our GPT and its training step in plain PyTorch, to be compared with.

The same shapes and arithmetic as `nanochat_jax.lm`: the loss of equal weights is equal,
which `tests/test_torch_gpt.py` checks. PyTorch's own parts are used where it has them:
scaled dot-product attention, fused AdamW, and `torch.optim.Muon`, which iterates in
bfloat16, where that is native.

Axes: B batch, S sequence, D model, N heads, H head size, F feed-forward, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from nanochat_jax.numerics.forms import resolve_dtype

EPSILON = 1e-6  # of all norms, as in Flax


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        linear = lambda: nn.Linear(config.dim, config.dim, bias=False)
        self.query, self.key, self.value = linear(), linear(), linear()
        self.out = linear()
        self.head_dim = config.head_size

    def forward(self, x, cos, sin):
        heads = lambda linear: linear(x).unflatten(-1, (-1, self.head_dim))
        turn = lambda q: rotate(norm(q), cos, sin).transpose(1, 2)
        query, key = turn(heads(self.query)), turn(heads(self.key))
        value = heads(self.value).transpose(1, 2)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, EPSILON)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, EPSILON)
        self.ffn = FeedForward(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Decoder with as many key as query heads, and a tied embedding."""

    def __init__(self, config):
        super().__init__()
        assert config.kv_heads == config.n_heads
        assert config.weight_tied
        assert config.table_size == config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.dim, EPSILON)
        angles = rotary_angles(config)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, batch):
        """Returns the mean loss, in nats, of `batch`, ids `[B, S + 1]`."""
        tokens, labels = batch[:, :-1], batch[:, 1:]
        cos, sin = (table[: tokens.shape[1], None] for table in (self.cos, self.sin))
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.final_norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def load(self, params):
        """Takes the parameters of our model, nested dicts of NumPy arrays."""
        self.embed.weight.copy_(torch.tensor(params["embed"]["embedding"]))
        self.final_norm.weight.copy_(torch.tensor(params["final_norm"]["scale"]))
        for i, block in enumerate(self.blocks):
            for name, weight in block.named_parameters():
                value = params["blocks"][i]
                for part in name.split(".")[:-1]:
                    value = value[part]
                array = value["kernel"].T if "kernel" in value else value["scale"]
                weight.copy_(torch.tensor(array))
        return self


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


def rotary_angles(config):
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-torch.arange(half) / half)
    return torch.outer(torch.arange(config.max_seq_len), frequencies)


def rotate(x, cos, sin):
    """Turns heads `[B, S, N, H]` by angles `[S, 1, H / 2]`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Float32Muon(torch.optim.Muon):
    """PyTorch's Muon with Newton-Schulz in float32 and without weight decay.

    Its own is always in bfloat16, which cores that lack it multiply at a fraction of
    the rate of float32.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert group["nesterov"] and not group["weight_decay"]
            assert group["adjust_lr_fn"] is None
            for weight in group["params"]:
                self._update(weight, group)

    def _update(self, weight, group):
        beta, state = group["momentum"], self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - beta)
        x = weight.grad.lerp(momentum, beta)
        rows, columns = x.shape
        x = newton_schulz(x, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight.sub_(x, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def newton_schulz(x, coefficients, steps, epsilon):
    """Orthogonalises `x`, `[rows, columns]`, by `steps` of a quintic, in its type."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Step:
    """A training step with its own parameters: Muon for matrices, AdamW for the rest.

    Newton-Schulz is in the type that `config.ns_dtype` is on this machine. With
    `compiled`, both the loss and the optimizers' steps go through `torch.compile`.
    """

    def __init__(self, config, params, batch, compiled=False):
        self.model = GPT(config).load(params)
        self.batch = torch.tensor(batch, dtype=torch.long)
        matrices = list(self.model.blocks.parameters())
        matrices = [weight for weight in matrices if weight.ndim == 2]
        taken = set(map(id, matrices))
        others = [p for p in self.model.parameters() if id(p) not in taken]
        beta, steps = config.muon_momentum, config.ns_steps
        native = resolve_dtype(config.ns_dtype) == "bfloat16"
        muon = torch.optim.Muon if native else Float32Muon
        self.optimizers = [
            muon(matrices, config.lr, weight_decay=0.0, momentum=beta, ns_steps=steps),
            torch.optim.AdamW(
                others,
                config.fallback_peak_lr,
                config.adam_betas,
                weight_decay=0.0,
                fused=True,
            ),
        ]
        maybe = torch.compile if compiled else lambda function: function
        self.loss = maybe(self.model)
        self.steps = [maybe(optimizer.step) for optimizer in self.optimizers]
        self.clip = config.grad_clip

    def __call__(self):
        loss = self.loss(self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for step in self.steps:
            step()
        self.model.zero_grad()
        return loss.item()
