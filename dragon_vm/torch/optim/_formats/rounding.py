"""Formats of one part: a dtype with rounding to nearest, and bf16 rounded stochastically or upwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.bits import bits_of, round_by, round_up, upper_half
from dragon.vm.torch.optim._formats.format import Part, required


@cache
def _plain_parts(dtype: torch.dtype) -> tuple[Part, ...]:
    return (Part("", dtype),)


@dataclass(frozen=True)
class Plain:
    """A floating point dtype, rounded to nearest."""

    dtype: torch.dtype
    stochastic = False

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def parts(self) -> tuple[Part, ...]:
        return _plain_parts(self.dtype)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The value in the dtype of the maths: fp32 for a narrower one."""
        return parts[0].float() if self.dtype.itemsize < 4 else parts[0]

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """The value: copying rounds to nearest."""
        return (value,)


@dataclass(frozen=True)
class StochasticBfloat16:
    """bf16, rounded up or down with probabilities that make the mean exact.

    Rounding to nearest would lose every change below half a unit in the last place.
    """

    name = "bfloat16_stochastic"
    parts = (Part("", torch.bfloat16),)
    stochastic = True

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].float()

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round by 16 random bits an element."""
        return (upper_half(round_by(bits_of(value), required(words, self.name), 16)),)


@dataclass(frozen=True)
class UpwardBfloat16:
    """bf16, rounded up: a running maximum that never shrinks and is never below the true one."""

    name = "bfloat16_upward"
    parts = (Part("", torch.bfloat16),)
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].float()

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round to the least bf16 number that is not below the value."""
        return (upper_half(round_up(bits_of(value))),)
