"""Codecs: how an optimizer state leaf is stored between two steps.

A codec makes a `Quantized` array of an array, under three laws:

  * `encode(x).decode()` is within half the gap between the codec's levels around `x`
    (a whole gap if the rounding is stochastic; more beyond the levels of `Normal2`);
  * `encode(q.decode()) == q` if the rounding is to nearest: storing a decoded array
    again changes nothing (with bfloat16 scales, `Dynamic8` may move the largest entry
    of a block by one level, once);
  * zero is stored as zero, and a block with an entry that is not finite is decoded
    without a finite entry, so that a fault is seen rather than stored.

Blocks divide the last axis and never cross a row, so codes and scales are sharded as
the encoded array. The last block of a row may be shorter than the others.

base     `Codec`, the interface; `Quantized`; `Blockwise`, one scale for each block
blocks   blocks of the last axis, and several codes to a byte
tables   `TableCodec`, levels by any sorted table
linear   `Int8` and `Int4`
dynamic  `Dynamic8`
normal   `Normal4` and `Normal2`
hartley  the rotation of blocks for `Normal4` and `Normal2`
short_float  `BFloat16`, a cast of each entry

| codec | levels | for |
|---|---|---|
| `Int8`, `Int4` | evenly spaced | moments of even scale, bases |
| `Dynamic8` | a fixed count a decade | second moments; scales mixed within a block |
| `Normal4` | for normal entries, of rotated blocks | momentum in 4 bits |
| `Normal2` | likewise, without a zero, and cut | a complement's momentum in 2 bits |
| `BFloat16` | those of bfloat16, without blocks | any field, in half the bytes |
"""

from nanochat_jax.codecs.base import (
    Codec as Codec,
    Quantized as Quantized,
    ScaleDtype as ScaleDtype,
    is_quantized as is_quantized,
)
from nanochat_jax.codecs.dynamic import Dynamic8 as Dynamic8
from nanochat_jax.codecs.linear import Int4 as Int4, Int8 as Int8
from nanochat_jax.codecs.normal import Normal2 as Normal2, Normal4 as Normal4
from nanochat_jax.codecs.short_float import BFloat16 as BFloat16
