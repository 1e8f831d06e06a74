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
from nanochat_jax.config import OptimizerConfig as OptimizerConfig
from nanochat_jax.interop import (
    for_nnx as for_nnx,
    matrix_axes as matrix_axes,
    register_for_export as register_for_export,
)
from nanochat_jax.numerics import (
    POLYNOMIALS as POLYNOMIALS,
    QUINTIC as QUINTIC,
    Polynomials as Polynomials,
    newton_schulz as newton_schulz,
)
from nanochat_jax.optimizer import (
    MUON_STATIC as MUON_STATIC,
    Description as Description,
    MemoryReport as MemoryReport,
    build_optimizer as build_optimizer,
    bytes_per_device as bytes_per_device,
    describe as describe,
    distribute as distribute,
    init_sharded as init_sharded,
    label_params as label_params,
    memory_report as memory_report,
    muon as muon,
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
