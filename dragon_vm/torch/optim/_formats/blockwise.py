"""q8: moments in 8 bits, with one fp32 scale for each block of 64 elements.

    exp_avg     int8  c    m       = scale * sign(c) * (c / 127)^4
    exp_avg_sq  uint8 c    sqrt(v) = scale * (c / 255)^4

Only multiplication, addition and square root of fp32 are used, which are correctly rounded everywhere: every
device makes the same codes. No product may be fused with a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.bits import INFINITY, magnitude_bits, square_root
from dragon.vm.torch.optim._formats.format import BLOCK, Part, required

_ONE = 0x3F800000
# The least normal number: a block of smaller ones is stored as zeros.
_SMALLEST = 0x00800000

# y = GUESS - bits(x) // 4 is x^(-1/4) up to a factor: x y^4 is within [0.7495, 0.9487]. There
# E0 + E1 e + E2 e^2 - e^3 is e^(-3/4) up to a constant and a relative error of 1.4e-5. x y^3 times it is x^(1/4).
_GUESS = 0x4F4FF800
_E0, _E1, _E2 = 3.0351874828338623, -4.619477272033691, 3.471823215484619
# The constant's fourth power, times C^4, is what a magnitude that equals the scale is to become; its inverse.
_SIGNED_UNIT = 2.3883308769558e-09
_SQUARE_UNIT = 1.4694291195e-10

# z = INVERSE - bits(d) is 1 / d up to 5.1 %, and after two of Newton's steps up to 6.6e-6.
_INVERSE = 0x7EF31000

# The smallest scales but 0, 2^-96 and 2^-42. With them the code 1 stands for a normal fp32 first moment, and for a
# second moment above 0 in fp32. A first moment below its scale has lost the second one to underflow.
_SIGNED_FLOOR = 0x0F800000
_SQUARE_FLOOR = 0x2A800000

# Adding it rounds an fp32 number below 2^22 to nearest, ties to even.
_INTEGER = 12582912.0


def _scales_and_steps(magnitude: Tensor, floor: int, unit: float) -> tuple[Tensor, Tensor]:
    """Scales, and the magnitudes as numbers of steps.

    Args:
        magnitude: bits of fp32 without sign, int32 [blocks, `BLOCK`].
        floor: bits of the smallest scale.
        unit: what the scale is multiplied with, for the inverse.

    Returns:
        Scales, fp32 [blocks]: the blocks' maxima, 0 for zeros, NaN with a NaN or infinity. And
        C (magnitude / scale)^(1/4), fp32 [blocks, `BLOCK`].
    """
    peak = magnitude.amax(1)
    broken, empty = peak >= INFINITY, peak < _SMALLEST
    divisor = torch.where(broken, _ONE, peak.clamp(min=floor)).view(torch.float32)
    scale = torch.where(broken, torch.nan, torch.where(empty, 0.0, divisor))
    inverse = _inverse(divisor * unit)
    # All bits or none.
    whole = (broken | empty).to(torch.int32) - 1
    x = (magnitude & whole[:, None]).view(torch.float32).mul_(inverse[:, None])
    return scale, _fourth_root(x)


def _inverse(d: Tensor) -> Tensor:
    """1 / d up to 6.6e-6, without a division."""
    z = (_INVERSE - d.view(torch.int32)).view(torch.float32)
    z = z * (2.0 - d * z)
    return z * (2.0 - d * z)


def _fourth_root(x: Tensor) -> Tensor:
    """x^(1/4) up to a constant factor and a relative error of 1.4e-5."""
    y = (_GUESS - (x.view(torch.int32) >> 2)).view(torch.float32)
    root = (y * y).mul_(y).mul_(x)
    e = root * y
    return (_E2 - e).mul_(e).add_(_E1).mul_(e).add_(_E0).mul_(root)


def _square(steps: Tensor, scale: Tensor) -> Tensor:
    """The second moment at a number of steps."""
    power = steps * (1 / 255)
    power *= power
    power *= power
    power *= scale[:, None]
    power *= power
    return power


def _last_byte(steps: Tensor) -> Tensor:
    """Integers with the rounded steps as their last byte, in the memory of the steps."""
    return steps.add_(_INTEGER).view(torch.int32)


@dataclass(frozen=True)
class SignedQ8:
    """8-bit storage of exp_avg, rounded to nearest in steps of the fourth root."""

    name = "q8_signed"
    parts = (Part("_q8", torch.int8), Part("_scale", torch.float32, BLOCK))
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        ratio = codes.view(-1, BLOCK).float().mul_(1 / 127)
        power = ratio.abs().mul_(ratio).mul_(ratio.mul_(ratio))
        return power.mul_(scale.view(-1, 1)).view(codes.shape)

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Divide each block by its maximum and round."""
        blocks = value.view(-1, BLOCK)
        scale, steps = _scales_and_steps(magnitude_bits(blocks), _SIGNED_FLOOR, _SIGNED_UNIT)
        return _last_byte(steps.copysign_(blocks)).to(torch.int8).view(value.shape), scale


@dataclass(frozen=True)
class SquareQ8:
    """8-bit storage of exp_avg_sq, by its square root. The code 0 stands for 0 alone.

    Attributes:
        stochastic: round with an exact mean of exp_avg_sq, instead of to nearest.
    """

    stochastic: bool
    parts = (Part("_q8", torch.uint8), Part("_scale", torch.float32, BLOCK))

    @property
    def name(self) -> str:
        return "q8_square_stochastic" if self.stochastic else "q8_square"

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        return _square(codes.view(-1, BLOCK).float(), scale.view(-1)).view(codes.shape)

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Divide the roots of each block by their maximum and round; a negative number makes its block NaN."""
        blocks = value.view(-1, BLOCK)
        scale, steps = _scales_and_steps(magnitude_bits(square_root(blocks)), _SQUARE_FLOOR, _SQUARE_UNIT)
        if self.stochastic:
            words = required(words, self.name).view(-1, BLOCK)
            steps = _step_stochastically(blocks, steps, scale, words)
        # At least one step for what is above 0. Nothing is above a zero that is NaN, of a block without a number.
        zero = scale - scale
        steps = steps.maximum(blocks > zero[:, None])
        return _last_byte(steps).to(torch.uint8).view(value.shape), scale


def _step_stochastically(value: Tensor, steps: Tensor, scale: Tensor, words: Tensor) -> Tensor:
    """Move on to the step beyond the value with the probability that makes the mean exact.

    The decoded second moments themselves decide: a value that has a code gets that code. No value moves on from
    the largest code: the rounding of the root is less than 2^-17 of a step.
    """
    steps = (steps + _INTEGER).sub_(_INTEGER)
    here = _square(steps, scale)
    gap = value - here
    direction = gap.sign()
    distance = _square(steps + direction, scale).sub_(here).abs_()
    uniform = words.float().add_(0.5).mul_(2.0**-16)
    # As fp32, 1 or 0.
    is_moving = uniform.mul_(distance).lt_(gap.abs_())
    return is_moving.mul_(direction).add_(steps)
