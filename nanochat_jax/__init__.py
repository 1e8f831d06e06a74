"""Muon, 8-bit momentum and GaLore for Optax."""

from nanochat_jax.codecs import (
    Codec as Codec,
    Dynamic8 as Dynamic8,
    Float8 as Float8,
    Int4 as Int4,
    Int8 as Int8,
    MuLaw8 as MuLaw8,
    Normal2 as Normal2,
    Normal4 as Normal4,
    Quantized as Quantized,
)
from nanochat_jax.coefficients import (
    POLYNOMIALS as POLYNOMIALS,
    QUINTIC as QUINTIC,
    Polynomials as Polynomials,
)
from nanochat_jax.config import OptimizerConfig as OptimizerConfig
from nanochat_jax.interop import matrix_axes as matrix_axes
from nanochat_jax.interop.arrays import for_nnx as for_nnx
from nanochat_jax.interop.export import register_for_export as register_for_export
from nanochat_jax.linalg import newton_schulz as newton_schulz
from nanochat_jax.memory import (
    MemoryReport as MemoryReport,
    memory_report as memory_report,
)
from nanochat_jax.optimizer import (
    MUON_STATIC as MUON_STATIC,
    Description as Description,
    build_optimizer as build_optimizer,
    describe as describe,
    muon as muon,
)
from nanochat_jax.roles import label_params as label_params
from nanochat_jax.sharding import (
    bytes_per_device as bytes_per_device,
    distribute as distribute,
    init_sharded as init_sharded,
    state_sharding as state_sharding,
)
from nanochat_jax.transforms import (
    Adaptive as Adaptive,
    AdaptiveState as AdaptiveState,
    CorrectedMomentumState as CorrectedMomentumState,
    GaloreState as GaloreState,
    MatrixAxes as MatrixAxes,
    MomentumState as MomentumState,
    QuantizationError as QuantizationError,
    QuantizeState as QuantizeState,
    as_matrices as as_matrices,
    dequantize as dequantize,
    galore as galore,
    momentum as momentum,
    orthogonalize as orthogonalize,
    project_gradients as project_gradients,
    quantization_error as quantization_error,
    quantize as quantize,
    quantize_state as quantize_state,
    scale_by_shape as scale_by_shape,
    sequence as sequence,
)
