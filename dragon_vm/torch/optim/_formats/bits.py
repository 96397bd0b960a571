"""Rounding of fp32 by its bits. Every device gets the same result."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._devices import has_float64

INFINITY = 0x7F800000
_LARGEST = 0x7F7FFFFF
_MAGNITUDE = 0x7FFFFFFF


def bits_of(value: Tensor) -> Tensor:
    """The bits of fp32 as int32, NaN always as 0x7FC00000: devices differ in the NaN that they make."""
    return value.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)


def magnitude_bits(value: Tensor) -> Tensor:
    """The bits of fp32 without sign as int32; their order is that of the magnitudes, infinity and NaN last."""
    return value.view(torch.int32) & _MAGNITUDE


@cache
def numpy_of(device: torch.device) -> Any:
    """NumPy, which does some operations faster, for tensors on the CPU; None on other devices and without it."""
    try:
        import numpy

        # Fails where NumPy and PyTorch do not understand each other.
        torch.empty(0, dtype=torch.float32, device="cpu").numpy()
    except (ImportError, RuntimeError):
        return None
    return numpy if device.type == "cpu" else None


def square_root(value: Tensor) -> Tensor:
    """The correctly rounded square root of fp32.

    PyTorch's own is MKL's on most processors, which is wrong in the last bit for a sixth of all numbers. NumPy's
    is the processor's. The root in fp64 is off by less than the distance of any exact root from the middle of two
    fp32 numbers, and takes five times as long. Tensors without memory of their own take it. A device without fp64
    has its own root.
    """
    numpy = numpy_of(value.device)
    if numpy is None or type(value) is not Tensor:
        return value.double().sqrt().float() if has_float64(value.device) else value.sqrt()
    with numpy.errstate(invalid="ignore"):
        return torch.from_numpy(numpy.sqrt(value.numpy()))


def round_by(bits: Tensor, carry: Tensor | int, dropped: int) -> Tensor:
    """Add a carry and clear the last `dropped` bits.

    The mean over all carries in [0, 2^dropped) is the number itself. Half of 2^dropped as carry rounds to nearest,
    ties away from zero. Close to the largest finite number the carry is cut: no finite number gets infinite.

    Args:
        bits: of fp32, int32.
        carry: int32, in [0, 2^dropped).
        dropped: bits to clear.
    """
    # Negative for infinity and NaN.
    room = _LARGEST - (bits & _MAGNITUDE)
    return (room.clamp_(min=0).clamp_(max=carry) + bits).bitwise_and_(-(1 << dropped))


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
