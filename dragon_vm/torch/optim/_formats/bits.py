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


def square_root(value: Tensor) -> Tensor:
    """The correctly rounded square root of fp32.

    PyTorch's own is MKL's on most processors, which is wrong in the last bit for a sixth of all numbers. The
    root in fp64 is off by less than the distance of any exact root from the middle of two fp32 numbers.
    """
    return value.double().sqrt().float()


def round_by(bits: Tensor, carry: Tensor, dropped: int, largest: int) -> Tensor:
    """Add a carry and clear the last `dropped` bits.

    The mean over all carries in [0, 2^dropped) is the number itself. Half of 2^dropped as carry rounds to nearest,
    ties away from zero. A number beyond `largest` is truncated: no finite number gets infinite.

    Args:
        bits: of fp32, int32.
        carry: int32, in [0, 2^dropped).
        dropped: bits to clear.
        largest: bits of the largest finite result.
    """
    return (bits + torch.where((bits & _MAGNITUDE) < largest, carry, 0)) & -(1 << dropped)


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
