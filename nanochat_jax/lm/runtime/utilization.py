"""Memory in use, bytes of arrays, and the share of the devices' peak that a run gets.

Peaks are the published ones of dense products, without sparsity, per JAX device.
Sources: data sheets of NVIDIA A100, H100, H200, L40S and HGX B200, the architecture
papers of Ampere, Hopper and Ada, and the pages of Cloud TPU v4, v5e, v5p and v6e. In
JAX, float32 products run in TF32 on NVIDIA GPUs and in bfloat16 on TPUs by default, so
`float32` has the peaks of these types.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Device(Protocol):
    """The part of a `jax.Device` that is needed here."""

    @property
    def device_kind(self) -> str:
        """Name of the model."""
        ...


class _Peak(NamedTuple):
    """Published dense peaks of a device, in TFLOP/s."""

    bfloat16: float
    float32: float


_A100 = _Peak(312, 156)
_H100_SXM = _Peak(989.4, 494.7)

# By the full name of the device in JAX: a similar name may be a slower model.
_PEAKS = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _Peak(756, 378),
    "NVIDIA H200": _H100_SXM,
    "NVIDIA B200": _Peak(2250, 1125),
    "NVIDIA L40S": _Peak(362.05, 183),
    "NVIDIA GeForce RTX 4090": _Peak(165.2, 82.6),
    "TPU v4": _Peak(275, 275),
    "TPU v5 lite": _Peak(197, 197),
    "TPU v5e": _Peak(197, 197),
    "TPU v5": _Peak(459, 459),
    "TPU v5p": _Peak(459, 459),
    "TPU v6 lite": _Peak(918, 918),
    "TPU v6e": _Peak(918, 918),
}


def peak_flops(device: Device, dtype: DTypeLike) -> float | None:
    """Returns the published peak of a device, in floating-point operations a second.

    Args:
      device: The device.
      dtype: Type of the products, bfloat16 or float32.

    Returns:
      Operations a second, dense; `None` for a device or type that is not in the table.
    """
    peak = _PEAKS.get(device.device_kind)
    tera = getattr(peak, jnp.dtype(dtype).name, None)
    return None if tera is None else tera * 1e12


def mfu(
    tokens_per_s: float,
    flops_per_token: float,
    devices: Sequence[Device],
    dtype: DTypeLike = jnp.bfloat16,
) -> float | None:
    """Returns the model FLOPs utilisation (Chowdhery et al., 2022, appendix B).

    Args:
      tokens_per_s: Tokens trained on in a second, on all devices together.
      flops_per_token: Operations of the model for a token, without the optimizer and
        recomputation: `model.count_flops_per_token`.
      devices: Devices of the run.
      dtype: Type of the products, `compute_dtype`.

    Returns:
      The fraction of the devices' peak, from 0 to 1; `None` if a peak is not known.
    """
    peaks = [peak_flops(device, dtype) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    return tokens_per_s * flops_per_token / sum(known)


def memory_in_use() -> int | None:
    """Returns the bytes in use on the fullest device of this process.

    On the CPU this is the resident memory of the process, or `None` where the system
    does not report it.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    held = [found["bytes_in_use"] for found in stats if found]
    return max(held) if held else _resident_bytes()


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of the arrays of a tree, on all devices together.

    Args:
      tree: Arrays, or `jax.ShapeDtypeStruct`s.
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _resident_bytes() -> int | None:
    """Returns the memory of this process that is not swapped out, on Linux."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
