"""q8: moments in 8 bits with an fp32 scale for each 64 elements, on tiles. The host has the same functions.

Bit for bit those of ``_formats/blockwise.py`` in the optimizer, which explains the constants. Compile with
``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels.rounding import INFINITY, MAGNITUDE, NAN, SIGN, uniform

BLOCK = tl.constexpr(64)
_ONE = tl.constexpr(0x3F800000)
_SMALLEST = tl.constexpr(0x00800000)
_GUESS = tl.constexpr(0x4F4FF800)
_E0 = tl.constexpr(3.0351874828338623)
_E1 = tl.constexpr(-4.619477272033691)
_E2 = tl.constexpr(3.471823215484619)
_SIGNED_UNIT = tl.constexpr(2.3883308769558e-09)
_SQUARE_UNIT = tl.constexpr(1.4694291195e-10)
_INVERSE = tl.constexpr(0x7EF31000)
_SIGNED_FLOOR = tl.constexpr(0x0F800000)
_SQUARE_FLOOR = tl.constexpr(0x2A800000)
_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _blocks(tile, N_BLOCKS: tl.constexpr):
    return tl.reshape(tile, (N_BLOCKS, BLOCK))


@triton.jit
def _scales_and_steps(magnitude, FLOOR: tl.constexpr, UNIT: tl.constexpr):
    """Scales [blocks] and steps [blocks, BLOCK] of magnitudes, the bits of fp32 without sign as uint32."""
    # A maximum of integers: infinity and NaN are the largest, and no rule for NaN is needed.
    peak = tl.max(magnitude, 1)
    broken = peak >= INFINITY
    empty = peak < _SMALLEST
    divisor = tl.where(broken, _ONE, tl.maximum(peak, FLOOR))
    scale = tl.where(broken, NAN, tl.where(empty, 0, divisor)).to(tl.float32, bitcast=True)
    inverse = _inverse(divisor.to(tl.float32, bitcast=True) * UNIT)
    # A mask in place of a select: it clears a sign too.
    whole = tl.where(broken | empty, 0, MAGNITUDE)
    x = (magnitude & whole[:, None]).to(tl.float32, bitcast=True) * inverse[:, None]
    return scale, _fourth_root(x)


@triton.jit
def _inverse(d):
    """1 / d up to 6.6e-6, without a division."""
    z = (-d.to(tl.int32, bitcast=True) + _INVERSE).to(tl.float32, bitcast=True)
    z = z * (-(d * z) + 2.0)
    return z * (-(d * z) + 2.0)


@triton.jit
def _fourth_root(x):
    """x^(1/4) up to a constant factor and a relative error of 1.4e-5."""
    y = (-(x.to(tl.int32, bitcast=True) >> 2) + _GUESS).to(tl.float32, bitcast=True)
    root = x * (y * y * y)
    e = root * y
    return root * tl.sub(_E0, e * tl.sub(e * (e - _E2), _E1))


@triton.jit
def _square(steps, scale):
    """The second moment at a number of steps, at least 0."""
    ratio = steps * (1 / 255)
    ratio *= ratio
    root = scale[:, None] * (ratio * ratio)
    return root * root


@triton.jit
def decode_signed(
    codes,  # int8 [n]
    scale,  # fp32 [n // 64]
):
    """First moments, fp32 [n]."""
    ratio = _blocks(codes, scale.shape[0]).to(tl.float32) * (1 / 127)
    power = (ratio * tl.abs(ratio)) * (ratio * ratio)
    return tl.reshape(scale[:, None] * power, codes.shape)


@triton.jit
def encode_signed(
    tile,  # fp32 [n]
):
    """Codes int8 [n] and scales fp32 [n // 64] of first moments, to nearest."""
    bits = _blocks(tile.to(tl.uint32, bitcast=True), tile.shape[0] // BLOCK)
    scale, steps = _scales_and_steps(bits & MAGNITUDE, _SIGNED_FLOOR, _SIGNED_UNIT)
    signed = (steps.to(tl.uint32, bitcast=True) | (bits & SIGN)).to(tl.float32, bitcast=True)
    codes = (signed + _INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.reshape(codes, tile.shape), scale


@triton.jit
def decode_square(
    codes,  # uint8 [n]
    scale,  # fp32 [n // 64]
):
    """Second moments, fp32 [n]."""
    return tl.reshape(_square(_blocks(codes, scale.shape[0]).to(tl.float32), scale), codes.shape)


@triton.jit
def _step_stochastically(tile, steps, scale, words):
    """Move on to the step beyond the second moment with the probability that makes the mean exact."""
    steps = steps + _INTEGER - _INTEGER
    here = _square(steps, scale)
    gap = tile - here
    one = ((gap.to(tl.uint32, bitcast=True) & SIGN) | _ONE).to(tl.float32, bitcast=True)
    beyond = steps + one
    distance = tl.abs(_square(beyond, scale) - here)
    return tl.where(uniform(words) * distance < tl.abs(gap), beyond, steps)


@triton.jit
def encode_square(
    tile,  # fp32 [n], second moments
    root,  # fp32 [n], their correctly rounded square roots
    words,  # int32 [n] in [0, 65536), any if not STOCHASTIC
    STOCHASTIC: tl.constexpr,
):
    """Codes uint8 [n] and scales fp32 [n // 64] of second moments; the code 0 for 0 alone."""
    N_BLOCKS: tl.constexpr = tile.shape[0] // BLOCK
    tile_2d = _blocks(tile, N_BLOCKS)
    # A root has no sign, unless it is a NaN, which is then the largest of unsigned numbers.
    bits = _blocks(root.to(tl.uint32, bitcast=True), N_BLOCKS)
    scale, steps = _scales_and_steps(bits, _SQUARE_FLOOR, _SQUARE_UNIT)
    if STOCHASTIC:
        steps = _step_stochastically(tile_2d, steps, scale, _blocks(words, N_BLOCKS))
    # Nothing is above a zero that is NaN: a block without a number has the code 0.
    zero = scale - scale
    steps = tl.maximum(steps, (tile_2d > zero[:, None]).to(tl.float32))
    codes = (steps + _INTEGER).to(tl.int32, bitcast=True).to(tl.uint8)
    return tl.reshape(codes, tile.shape), scale
