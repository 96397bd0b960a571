"""Adam with moments and parameters in given formats, as a plain loop, and the modes that are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.memory.peers import Dynamic, Float8, LinearRoot, Softsign
from dragon.vm.torch.optim._formats import (
    Format,
    Plain,
    Rounding,
    SignedQ8,
    Split8,
    Split16,
    SquareQ8,
    StochasticBfloat16,
    clamp_moment,
    is_blockwise,
    moment_bound,
    random_words,
    square_root,
)

FP32, BF16 = Plain(torch.float32), Plain(torch.bfloat16)
BETAS = (0.9, 0.999)
EPS = 1e-8


class Mode(NamedTuple):
    """What is stored how; `bounded` clamps the first moment."""

    param: Format = FP32
    exp_avg: Format = FP32
    exp_avg_sq: Format = FP32
    bounded: bool = False


MODES = {
    "fp32": Mode(),
    "fp32, bf16 states": Mode(FP32, BF16, StochasticBfloat16(), True),
    "fp32, bf16 states to nearest": Mode(FP32, BF16, BF16),
    "fp32, 8bit": Mode(FP32, SignedQ8(), SquareQ8(True), True),
    "split16": Mode(Split16()),
    "split8, bf16 states": Mode(Split8(True), BF16, StochasticBfloat16(), True),
    "split8, 8bit": Mode(Split8(True), SignedQ8(), SquareQ8(True), True),
    "bf16 stochastic, bf16 states": Mode(StochasticBfloat16(), BF16, StochasticBfloat16(), True),
    "bf16 stochastic, 8bit": Mode(StochasticBfloat16(), SignedQ8(), SquareQ8(True), True),
    "bf16 to nearest": Mode(BF16),
    "FlashOptim's": Mode(FP32, Softsign(), LinearRoot()),
    "bitsandbytes'": Mode(FP32, Dynamic(True), Dynamic(False)),
    "e4m3": Mode(FP32, Float8(), Float8()),
}


class Stored:
    """One value in its format.

    Attributes:
        form: the format.
        parts: its tensors.
    """

    def __init__(self, form: Format, value: Tensor) -> None:
        self.form = form
        self.parts = [torch.zeros(part.numel(value.numel()), dtype=part.dtype) for part in form.parts]
        zeros = torch.zeros(value.numel(), dtype=torch.int32)
        form.encode(value.reshape(-1), self.parts, zeros if form.stochastic else None)

    def read(self) -> Tensor:
        """The value."""
        return self.form.decode(self.parts)

    def write(self, value: Tensor, words: Tensor | None) -> None:
        """Store another value."""
        self.form.encode(value, self.parts, words)


class FormatAdam:
    """Adam of one parameter, whose small tensors keep fp32 moments in 8-bit modes.

    Attributes:
        largest: the largest update so far, in learning rates.
    """

    def __init__(self, param: Tensor, mode: Mode, stream: int, lr: float) -> None:
        shape = param.shape
        narrow = is_blockwise(shape) or mode.exp_avg.parts[-1].elements == 1
        self.bounded = mode.bounded and narrow
        self.master = Stored(mode.param, param.detach())
        self.exp_avg = Stored(mode.exp_avg if narrow else FP32, torch.zeros(shape))
        self.exp_avg_sq = Stored(mode.exp_avg_sq if narrow else FP32, torch.zeros(shape))
        self.stream, self.lr, self.steps, self.largest = stream, lr, 0, 0.0

    def step(self, grad: Tensor) -> None:
        """One step."""
        grad = grad.reshape(-1).float()
        self.steps += 1
        beta1, beta2 = BETAS
        exp_avg = beta1 * self.exp_avg.read() + (1 - beta1) * grad
        exp_avg_sq = beta2 * self.exp_avg_sq.read() + (1 - beta2) * grad * grad
        root = square_root(exp_avg_sq)
        if self.bounded:
            exp_avg = clamp_moment(exp_avg, root, moment_bound(beta1, beta2, self.steps))
        correction = math.sqrt(1 - beta2**self.steps)
        update = correction / (1 - beta1**self.steps) * exp_avg / (root + EPS * correction)
        self.largest = max(self.largest, float(update.abs().nan_to_num(math.inf).max()))
        first = second = None
        if any(value.form.stochastic for value in (self.master, self.exp_avg, self.exp_avg_sq)):
            first, second = random_words(Rounding(0, self.stream, self.steps, 0), grad.numel())
        self.master.write(self.master.read() - self.lr * update, first)
        self.exp_avg.write(exp_avg, first)
        self.exp_avg_sq.write(exp_avg_sq, second)

    def forward_weight(self) -> Tensor:
        """What the forward pass sees: the parameter's own tensor."""
        return self.master.parts[0].float()


class Optimizer:
    """`FormatAdam` of all parameters of a network, which sees the parameters as they are stored."""

    def __init__(self, params: Iterable[Tensor], mode: Mode, lr: float) -> None:
        self.params = list(params)
        self.adams = [FormatAdam(param, mode, stream, lr) for stream, param in enumerate(self.params)]
        self._show()

    def _show(self) -> None:
        with torch.no_grad():
            for param, adam in zip(self.params, self.adams, strict=True):
                param.copy_(adam.forward_weight().view(param.shape))

    def step(self) -> None:
        """Step with the gradients that the parameters have, and drop them."""
        for param, adam in zip(self.params, self.adams, strict=True):
            assert param.grad is not None
            adam.step(param.grad)
            param.grad = None
        self._show()

    @property
    def largest(self) -> float:
        """The largest update so far, in learning rates."""
        return max(adam.largest for adam in self.adams)
