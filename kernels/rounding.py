"""Rounding of fp32 tiles by their bits, and the random words for it. The host has the same functions.

Bit for bit those of ``_formats`` in the optimizer, which says what each is for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(0x80000000)
# The largest finite numbers with 8 and with 16 bits of mantissa.
MAX_BFLOAT16 = tl.constexpr(float.fromhex("0x1.FEp127"))
MAX_24_BIT = tl.constexpr(float.fromhex("0x1.FFFEp127"))

N_ROUNDS = tl.constexpr(7)

# The interpreter's own cast to bf16 truncates; a GPU's rounds to nearest, and is one instruction for two elements.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _words(calls, seed, step, stream):
    """The four words of each call of Philox-4x32-7: key `seed`, counter (E lo, E hi, step, stream)."""
    lower = (calls & 0xFFFFFFFF).to(tl.uint32)
    upper = (calls >> 32).to(tl.uint32)
    key_lower = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_upper = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox_impl(
        lower, upper, step.to(tl.uint32), stream.to(tl.uint32), key_lower, key_upper, n_rounds=N_ROUNDS
    )


@triton.jit
def _rotated(words):
    """32-bit words rotated left by a byte, of which an element's second word is taken."""
    return (words << 8) | (words >> 24)


@triton.jit
def random_words(
    first,  # int64, global index of the first element, a multiple of 8
    seed,  # int64
    step,  # int32 or int64, the tensor's own counter
    stream,  # int32 or int64
    NUMEL: tl.constexpr,
):
    """Two random words of 16 bits for each of consecutive elements, int32 [NUMEL]: a call of Philox for eight."""
    w0, w1, w2, w3 = _words((first >> 3) + tl.arange(0, NUMEL // 8), seed, step, stream)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (NUMEL // 2,))
    return _halves(words, NUMEL), _halves(_rotated(words), NUMEL)


@triton.jit
def _halves(words, NUMEL: tl.constexpr):
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (NUMEL,)).to(tl.int32)


@triton.jit
def random_words_each(
    index,  # int64 [n], global indices of any elements
    seed,  # int64
    step,  # int32 or int64, the tensor's own counter
    stream,  # int32 or int64
):
    """The words of `random_words` for elements that do not start a call: one call an element."""
    w0, w1, w2, w3 = _words(index >> 3, seed, step, stream)
    place = (index & 7).to(tl.int32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    rotated = _rotated(word)
    is_lower = (place & 1) == 0
    first = tl.where(is_lower, word & 0xFFFF, word >> 16)
    second = tl.where(is_lower, rotated & 0xFFFF, rotated >> 16)
    return first.to(tl.int32), second.to(tl.int32)


@triton.jit
def uniform(words):
    """Numbers (word + 1/2) / 65536 in fp32: a word is the last 16 bits of a number from 128 to 129."""
    return (words | 0x43000000).to(tl.float32, bitcast=True) - (128 - 1 / 131072)


@triton.jit
def bits_of(tile):
    """The bits of an fp32 tile as int32, with one NaN for all."""
    return tl.where(tile == tile, tile.to(tl.int32, bitcast=True), NAN)


@triton.jit
def round_by(tile, bits, carry, DROPPED: tl.constexpr, LARGEST: tl.constexpr):
    """Add a carry to the bits of a tile, if it is below `LARGEST` in magnitude, and clear the last `DROPPED`."""
    return tl.where(tl.abs(tile) < LARGEST, bits + carry, bits) & -(1 << DROPPED)


@triton.jit
def upper_half(bits):
    """The upper 16 bits as bf16."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def from_upper_half(half):
    """The bits of a bf16 tile in the upper 16 of an int32."""
    return half.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def wide_bfloat16(half):
    """fp32 of a bf16 tile: one instruction an element, where the compiler's own cast takes one and a half."""
    return from_upper_half(half).to(tl.float32, bitcast=True)


@triton.jit
def nearest_bfloat16(tile):
    """bf16 of an fp32 tile, to nearest with ties to even."""
    if _INTERPRETED:
        bits = bits_of(tile)
        # Unlike a master, a large finite number becomes infinite, as with every cast.
        return upper_half(bits + 0x7FFF + ((bits >> 16) & 1))
    return tile.to(tl.bfloat16)


@triton.jit
def stochastic_bfloat16(tile, words):
    """bf16 of an fp32 tile with an exact mean over all words. Its NaNs are those of arithmetic: quiet ones."""
    return upper_half(round_by(tile, tile.to(tl.int32, bitcast=True), words, 16, MAX_BFLOAT16))


@triton.jit
def upward_bfloat16(tile):
    """The least bf16 that is not below each element."""
    bits = bits_of(tile)
    return upper_half(bits + tl.where(bits > 0, 0xFFFF, 0))


@triton.jit
def join_16(half, remainder):
    """The fp32 master of a bf16 and an int16 tile."""
    return _joined(half, remainder.to(tl.int32))


@triton.jit
def split_16(tile):
    """The bf16 and the int16 tile of an fp32 master."""
    bits = bits_of(tile)
    return upper_half(bits + 0x8000), bits.to(tl.int16)


@triton.jit
def join_8(half, remainder):
    """The 24-bit master of a bf16 and an int8 tile."""
    return _joined(half, remainder.to(tl.int32) << 8)


@triton.jit
def _joined(half, distance):
    """The fp32 tile at a distance of bits from a bf16 one; that one itself where there is no number."""
    joined = (from_upper_half(half) + distance).to(tl.float32, bitcast=True)
    return tl.where(joined == joined, joined, wide_bfloat16(half))


@triton.jit
def split_8(tile, words, STOCHASTIC: tl.constexpr):
    """The bf16 and the int8 tile of a master, which is rounded to 24 bits."""
    bits = bits_of(tile)
    carry = words >> 8 if STOCHASTIC else 0x80
    bits = round_by(tile, bits, carry, 8, MAX_24_BIT)
    return upper_half(bits + 0x8000), (bits >> 8).to(tl.int8)


@triton.jit
def clamp_moment(exp_avg, root, bound):
    """The first moment within `bound` times the root of the second; a NaN stays, and all if there is no bound."""
    if bound < float("inf"):
        magnitude = tl.minimum(tl.abs(exp_avg), root * bound, tl.PropagateNan.ALL)
        sign = exp_avg.to(tl.int32, bitcast=True) & ~MAGNITUDE
        exp_avg = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return exp_avg


@triton.jit
def moment_bound(
    beta1,  # fp64 [n]
    beta2,  # fp64 [n]
    step,  # fp64 [n], at least 1
):
    """The largest |exp_avg| / sqrt(exp_avg_sq) of exact Adam after `step` steps, a little more, in float64.

    Round it to fp32 for `clamp_moment`. Infinite where nothing bounds the moment.
    """
    ratio = beta1 * beta1 / tl.where(beta2 > 0, beta2, 1.0)
    is_plain = (ratio > 0) & (ratio != 1) & (beta2 > 0)
    ratio = tl.where(is_plain, ratio, 0.5)
    exponent = step * tl.log(ratio)
    # expm1 as in `one_minus_power`.
    x = tl.minimum(tl.maximum(exponent, -700.0), 128.0)
    power = tl.exp(x)
    grown = tl.where(power == 1, x, (power - 1) * x / tl.log(tl.where(power == 1, 2.0, power)))
    terms = tl.where(exponent < 128, grown / (ratio - 1), float("inf"))
    endless = tl.where((step > 1) & (beta1 > 0), float("inf"), 1.0)
    special = tl.where(beta2 > 0, tl.where(beta1 > 0, step, 1.0), endless)
    terms = tl.where(is_plain, terms, special)
    return (1 - beta1) * tl.sqrt(terms / (1 - beta2)) * (1 + 1 / 262144)
