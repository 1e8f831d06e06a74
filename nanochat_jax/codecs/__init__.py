"""Codecs: how an optimizer state leaf is stored between two steps.

A codec is a pair `encode`, `decode` with three laws:

  * `decode(encode(x))` is within half the gap between the codec's levels around `x`
    (a whole gap if the rounding is stochastic; more beyond the levels of `Normal2`);
  * `encode(decode(q)) == q` if the rounding is to nearest: storing again what was
    stored changes nothing;
  * zero is stored as zero, and a block with an entry that is not finite comes back
    with none that is, so that a fault is seen rather than stored.

Blocks divide the last axis and never cross a row, so codes and scales are sharded as
the array they stand for. The last block of a row may be shorter than the others.

| codec | levels | for |
|---|---|---|
| `Int8`, `Int4` | evenly spaced | moments of even scale, projectors |
| `Dynamic8` | a fixed count a decade | second moments; scales mixed within a block |
| `MuLaw8` | evenly spaced logarithms, linear near zero | scales mixed within a block |
| `Float8` | of the type `float8_e4m3fn` | where hardware has it |
| `Normal4` | for normal entries, of rotated blocks | momentum in 4 bits |
| `Normal2` | likewise, without a zero, and cut | momentum of short memory in 2 bits |
"""

from nanochat_jax.codecs.base import (
    Codec as Codec,
    Quantized as Quantized,
    ScaleDtype as ScaleDtype,
)
from nanochat_jax.codecs.dynamic import Dynamic8 as Dynamic8
from nanochat_jax.codecs.float8 import Float8 as Float8
from nanochat_jax.codecs.linear import Int4 as Int4, Int8 as Int8
from nanochat_jax.codecs.mulaw import MuLaw8 as MuLaw8
from nanochat_jax.codecs.normal import Normal2 as Normal2, Normal4 as Normal4
