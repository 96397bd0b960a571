"""Models of how peers store moments, in the terms of the formats here, and Adam with them as a plain loop.

None of their code is used.

FlashOptim: linear codes of the softsign of exp_avg and of the root of exp_avg_sq, an fp16 scale for 32 elements.
bitsandbytes and torchao: both moments by a table of 256 numbers in seven decades, an fp32 scale for 256 elements.
fp8: both moments as e4m3, an fp32 scale for 128 elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.format import Format, Part
from dragon.vm.torch.optim._formats.resolve import is_blockwise
from dragon.vm.torch.optim._formats.rounding import Plain

EPS = 1e-8


def _scaled(value: Tensor, block: int, largest: float = 1.0) -> tuple[Tensor, Tensor]:
    """The value in blocks, relative to each block's maximum, and scales that are at `largest` there."""
    blocks = value.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True) / largest
    return torch.where(scale > 0, blocks / scale, 0.0), scale


@dataclass(frozen=True)
class Softsign:
    """exp_avg as int8 of its softsign."""

    name = "softsign8"
    parts = (Part("_q8", torch.int8), Part("_scale", torch.float16, 32))
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Invert the softsign."""
        codes, scale = parts
        ratio = codes.view(-1, 32).float() / 127
        return (scale.view(-1, 1).float() * ratio / (2 - ratio.abs())).view(codes.shape)

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round to nearest."""
        ratio, scale = _scaled(value, 32)
        codes = (127 * 2 * ratio / (1 + ratio.abs())).round().to(torch.int8)
        return codes.view(value.shape), scale.view(-1).half()


@dataclass(frozen=True)
class LinearRoot:
    """exp_avg_sq as uint8 of its root."""

    name = "sqrt8"
    parts = (Part("_q8", torch.uint8), Part("_scale", torch.float16, 32))
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Square."""
        codes, scale = parts
        return (scale.view(-1, 1).float() * codes.view(-1, 32).float() / 255).square().view(codes.shape)

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round to nearest."""
        ratio, scale = _scaled(value.sqrt(), 32)
        codes = (255 * ratio).round().nan_to_num(0.0).to(torch.uint8)
        return codes.view(value.shape), scale.view(-1).half()


@cache
def _dynamic_table(signed: bool) -> Tensor:
    """Numbers in [-1, 1] or [0, 1]: each decade has twice as many as the one below, 1e-6 the fewest."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        numbers += ((borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
    return torch.tensor(sorted({*numbers, *(-x for x in numbers[2:] if signed)})).float()


@cache
def _nearest_table(signed: bool) -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of an fp32 number the code of the least such number, and the borders between codes.

    Between two borders lies more than one number of 16 bits: the nearest code is that one or the next.
    """
    table = _dynamic_table(signed)
    borders = (table[1:] + table[:-1]) / 2
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    return torch.bucketize(least, borders, out_int32=True), torch.cat([borders, borders.new_tensor([torch.inf])])


@dataclass(frozen=True)
class Dynamic:
    """Either moment by a table."""

    signed: bool
    name = "dynamic8"
    parts = (Part("_q8", torch.uint8), Part("_scale", torch.float32, 256))
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Look up."""
        codes, scale = parts
        numbers = _dynamic_table(self.signed).index_select(0, codes.view(-1).int())
        return (scale.view(-1, 1) * numbers.view(-1, 256)).view(codes.shape)

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Find the nearest."""
        codes, borders = _nearest_table(self.signed)
        ratio, scale = _scaled(value, 256)
        low = codes.index_select(0, (ratio.view(torch.int32) >> 16 & 0xFFFF).view(-1))
        code = (low + (ratio.view(-1) > borders.index_select(0, low))).to(torch.uint8)
        return code.view(value.shape), scale.view(-1)


@dataclass(frozen=True)
class Float8:
    """Either moment as e4m3."""

    name = "e4m3"
    parts = (Part("_f8", torch.float8_e4m3fn), Part("_scale", torch.float32, 128))
    stochastic = False

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Scale."""
        codes, scale = parts
        return (scale.view(-1, 1) * codes.view(-1, 128).float()).view(codes.shape)

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round to nearest."""
        ratio, scale = _scaled(value, 128, 448.0)
        return ratio.to(torch.float8_e4m3fn).view(value.shape), scale.view(-1)


class Moments(NamedTuple):
    """The formats of both moments."""

    exp_avg: Format
    exp_avg_sq: Format


class _Stored:
    """One moment in its format, 0 at first."""

    def __init__(self, form: Format, numel: int) -> None:
        self.form = form
        self.parts = form.encode(torch.zeros(numel))

    def read(self) -> Tensor:
        """The moment."""
        return self.form.decode(self.parts)

    def write(self, value: Tensor) -> None:
        """Store another one."""
        self.parts = self.form.encode(value)


class PeerAdam:
    """Adam with the moments of large tensors in given formats; parameters and other moments are fp32."""

    def __init__(self, params: Iterable[Tensor], moments: Moments, betas: tuple[float, float]) -> None:
        self._params, self._betas, self._steps = list(params), betas, 0
        fp32 = Plain(torch.float32)
        self._moments = [
            [_Stored(form if is_blockwise(param.shape) else fp32, param.numel()) for form in moments]
            for param in self._params
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Step with the gradients that the parameters have, and drop them."""
        self._steps += 1
        beta1, beta2 = self._betas
        correction = math.sqrt(1 - beta2**self._steps)
        for param, (first, second) in zip(self._params, self._moments, strict=True):
            assert param.grad is not None
            grad = param.grad.reshape(-1)
            exp_avg = beta1 * first.read() + (1 - beta1) * grad
            exp_avg_sq = beta2 * second.read() + (1 - beta2) * grad * grad
            update = correction / (1 - beta1**self._steps) * exp_avg / (exp_avg_sq.sqrt() + EPS * correction)
            param -= lr * update.view_as(param)
            first.write(exp_avg)
            second.write(exp_avg_sq)
            param.grad = None

    def second_moment(self) -> Tensor:
        """exp_avg_sq of the first parameter, fp32."""
        return self._moments[0][1].read().view_as(self._params[0])

    def nbytes(self) -> int:
        """Bytes of parameters and moments."""
        stored = (moment for moments in self._moments for moment in moments)
        parts = sum(part.nbytes for moment in stored for part in moment.parts)
        return parts + sum(param.nbytes for param in self._params)
