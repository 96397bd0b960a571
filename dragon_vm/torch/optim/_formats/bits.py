"""Rounding of fp32 by its bits. Every device gets the same result."""

from __future__ import annotations

import torch
from torch import Tensor

INFINITY = 0x7F800000
NAN = 0x7FC00000
# The largest finite numbers with 8 and with 16 bits of mantissa.
MAX_BFLOAT16 = 0x7F7F0000
MAX_24_BIT = 0x7F7FFF00
_MAGNITUDE = 0x7FFFFFFF


def bits_of(value: Tensor) -> Tensor:
    """The bits of fp32 as int32, NaN always as the same one: devices differ in the NaN that they make."""
    return torch.where(value.isnan(), NAN, value.view(torch.int32))


def magnitude_bits(value: Tensor) -> Tensor:
    """The bits of fp32 without sign as int32; their order is that of the magnitudes, infinity and NaN last."""
    return value.view(torch.int32) & _MAGNITUDE


def round_stochastically(bits: Tensor, words: Tensor, dropped: int, largest: int) -> Tensor:
    """Clear the last `dropped` bits, upwards in magnitude as often as they tell.

    The mean over all `words` is the number itself. One beyond `largest` is truncated: no finite number gets infinite.

    Args:
        bits: of fp32, int32.
        words: uniform in [0, 2^dropped).
        dropped: bits to clear.
        largest: bits of the largest finite result.
    """
    carry = torch.where((bits & _MAGNITUDE) < largest, words, 0)
    return (bits + carry) & -(1 << dropped)


def round_to_nearest(bits: Tensor, dropped: int, largest: int) -> Tensor:
    """Clear the last `dropped` bits, to the nearest number, ties to even; `largest` as in stochastic rounding."""
    half = (1 << dropped - 1) - 1 + (bits >> dropped & 1)
    return round_stochastically(bits, half, dropped, largest)


def round_up(bits: Tensor) -> Tensor:
    """The least bf16 number that is not below the number."""
    return (bits + torch.where(bits > 0, 0xFFFF, 0)) & -(1 << 16)


def upper_half(bits: Tensor) -> Tensor:
    """The bf16 number that the upper 16 bits are."""
    # Not by fp32 to bf16: PyTorch's vector and scalar code differ in the NaN that they make of a NaN.
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def from_upper_half(half: Tensor) -> Tensor:
    """The bits of a bf16 number in the upper 16 of an int32."""
    return half.view(torch.int16).to(torch.int32) << 16
