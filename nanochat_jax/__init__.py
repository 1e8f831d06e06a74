"""Muon, 8-bit momentum and GaLore for Optax.

optimizer/   `muon` and `build_optimizer`, and reports on them
transforms/  the links and wrappers that these are made of
codecs/      arrays in few bits
numerics/    Newton-Schulz and the randomised range finder
interop/     axes from the modules of JAX's frameworks
config/      settings
lm/          a GPT and its trainer (extra `train`)
polynomials  the published polynomials of Newton-Schulz

State types and helpers are in these packages; `docs/ARCHITECTURE.md` is a map. A name
is loaded on its first use, so that the command line can print its help without JAX.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from nanochat_jax import (
        codecs as codecs,
        config as config,
        interop as interop,
        numerics as numerics,
        optimizer as optimizer,
        polynomials as polynomials,
        transforms as transforms,
    )
    from nanochat_jax.codecs import (
        Codec as Codec,
        Dynamic8 as Dynamic8,
        Int4 as Int4,
        Int8 as Int8,
        Normal2 as Normal2,
        Normal4 as Normal4,
        Quantized as Quantized,
    )
    from nanochat_jax.config import OptimizerConfig as OptimizerConfig
    from nanochat_jax.interop import (
        for_nnx as for_nnx,
        matrix_axes as matrix_axes,
        register_for_export as register_for_export,
        register_for_flax as register_for_flax,
    )
    from nanochat_jax.numerics import (
        POLYNOMIALS as POLYNOMIALS,
        QUINTIC as QUINTIC,
        Polynomials as Polynomials,
        newton_schulz as newton_schulz,
    )
    from nanochat_jax.optimizer import (
        MUON_STATIC as MUON_STATIC,
        build_optimizer as build_optimizer,
        bytes_per_device as bytes_per_device,
        describe as describe,
        distribute as distribute,
        init_sharded as init_sharded,
        label_params as label_params,
        learning_rates as learning_rates,
        memory_report as memory_report,
        muon as muon,
        state_sharding as state_sharding,
        update_in_backward as update_in_backward,
    )
    from nanochat_jax.transforms import (
        Basis as Basis,
        MatrixAxes as MatrixAxes,
        RandomizedSVD as RandomizedSVD,
        as_matrices as as_matrices,
        dequantize as dequantize,
        galore as galore,
        master_weights as master_weights,
        momentum as momentum,
        orthogonalize as orthogonalize,
        quantization_error as quantization_error,
        quantize as quantize,
        quantize_state as quantize_state,
        round_updates as round_updates,
        scale_by_shape as scale_by_shape,
        sequence as sequence,
        split_master as split_master,
    )

# The same names for those who run them; tests/test_start.py compares the two.
_NAMES = {
    "codecs": "Codec Dynamic8 Int4 Int8 Normal2 Normal4 Quantized",
    "config": "OptimizerConfig",
    "interop": "for_nnx matrix_axes register_for_export register_for_flax",
    "numerics": "POLYNOMIALS QUINTIC Polynomials newton_schulz",
    "optimizer": "MUON_STATIC build_optimizer bytes_per_device describe distribute "
    "init_sharded label_params learning_rates memory_report muon state_sharding "
    "update_in_backward",
    "polynomials": "",
    "transforms": "Basis MatrixAxes RandomizedSVD as_matrices dequantize galore "
    "master_weights momentum orthogonalize quantization_error quantize quantize_state "
    "round_updates scale_by_shape sequence split_master",
}
_PACKAGES = {name: package for package in _NAMES for name in _NAMES[package].split()}

__all__ = [*_PACKAGES]  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # or a type checker would take any name for one

    def __getattr__(name: str) -> Any:
        """Loads a public name, or a package, on its first use."""
        if name == "__version__":
            return importlib.metadata.version("nanochat-jax")
        package = _PACKAGES.get(name, name)
        if package not in _NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{package}")
        value = module if name == package else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_NAMES})
