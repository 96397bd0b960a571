"""Formats of a parameter with a master: bf16 for the forward pass, and what it lacks in a second tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.bits import bits_of, from_upper_half, round_by, upper_half
from dragon.vm.torch.optim._formats.format import Part, required

# Half a unit of the bf16 half. Ties go away from zero: to even, two masters would share their parts.
_HALF = 0x8000


def _joined(half: Tensor, distance: Tensor) -> Tensor:
    """The fp32 number at a distance of bits from a bf16 one; that one itself where there is no number.

    There is none below 0, which somebody may have written to a weight while its remainder stayed.
    """
    bits = from_upper_half(half)
    joined = (bits + distance).view(torch.float32)
    return torch.where(joined.isnan(), bits.view(torch.float32), joined)


def _distances(value: Tensor, half: Tensor | None) -> Tensor:
    """The distances in bits of masters from halves, from -2^15 to 2^15.

    Args:
        value: masters, fp32.
        half: bf16 numbers that the masters round to; where one does not, its master is left at it. None for the
            numbers that `encode` makes of the masters.
    """
    bits = bits_of(value)
    if half is None:
        return bits.to(torch.int16).to(torch.int32)
    distance = bits - from_upper_half(half)
    return distance.where((distance >= -_HALF) & (distance <= _HALF), 0)


@dataclass(frozen=True)
class Split16:
    """An fp32 master as the nearest bf16 number and a signed 16-bit difference of the bits.

    Every fp32 number is restored exactly. The bf16 half differs from ``.to(torch.bfloat16)`` at ties alone.
    """

    name = "split16"
    parts = (Part("", torch.bfloat16), Part("_remainder", torch.int16))
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return _joined(parts[0], parts[1].to(torch.int32))

    def encode_rest(self, value: Tensor, half: Tensor | None, remainder: Tensor) -> None:
        """Write what a half, which stays as it is, lacks of a master: see `_distances`."""
        remainder.copy_(_distances(value, half).clamp_(max=0x7FFF))

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Split the bits; a NaN becomes the one whose half is a NaN too."""
        bits = bits_of(value)
        return upper_half(bits + _HALF), bits.to(torch.int16)


@dataclass(frozen=True)
class Split8:
    """A master of 24 bits, 1 for the sign, 8 for the exponent and 15 for the mantissa, as bf16 and int8.

    Attributes:
        stochastic: round the master to 24 bits with an exact mean, instead of to nearest.
    """

    stochastic: bool
    parts = (Part("", torch.bfloat16), Part("_remainder", torch.int8))

    @property
    def name(self) -> str:
        return "split8_stochastic" if self.stochastic else "split8"

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return _joined(parts[0], parts[1].to(torch.int32) << 8)

    def encode_rest(self, value: Tensor, half: Tensor | None, remainder: Tensor) -> None:
        """Write what a half, which stays as it is, lacks of a master, to nearest: see `_distances`."""
        remainder.copy_(((_distances(value, half) + 0x80) >> 8).clamp_(max=127))

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round to 24 bits, by the upper 8 bits of the words if stochastic, and split them."""
        bits = bits_of(value)
        bits = round_by(bits, required(words, self.name) >> 8 if self.stochastic else 0x80, 8)
        return upper_half(bits + _HALF), (bits >> 8).to(torch.int8)


@dataclass(frozen=True)
class Master:
    """An fp32 master beside the narrow parameter, which is the master rounded to nearest."""

    dtype: torch.dtype
    stochastic = False

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}_master"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("", self.dtype), Part("_master", torch.float32))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[1]

    def encode_rest(self, value: Tensor, half: Tensor | None, master: Tensor) -> None:
        """Write masters for parameters that stay as they are: one that is not nearest to its master becomes it.

        All masters are written if `half` is None.
        """
        if half is None:
            master.copy_(value)
            return
        rounded = value.to(half.dtype)
        # At a tie there are two: the halves of other formats are rounded away from 0. Any number is nearer to a
        # master than the infinity that it rounds to, and still not nearest.
        is_as_near = rounded.isfinite() & ((value - half).abs() <= (value - rounded).abs())
        master.copy_(torch.where((rounded == half) | is_as_near, value, half))

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """The master twice: copying rounds it for the forward pass."""
        return value, value
