"""Parameters and gradients of a case: made once, and copied for each contender.

Every step meets what training gives it: gradients at new addresses, unless the case keeps them, and another
learning rate.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Precision

LR = 1e-3
BETAS = (0.9, 0.999)

# What the schedule multiplies each learning rate by at each step.
DECAY = 0.995

# The gradients of a chain come multiplied by LOSS_SCALE, and their norm is above MAX_GRAD_NORM.
LOSS_SCALE = 1024.0
MAX_GRAD_NORM = 1.0

# Adam hardly sees the scale of its gradients unless eps is about as large: a chain that scales or clips wrongly is
# wrong in its parameters only then.
EPS = 1e-8
CHAIN_EPS = 1e-3


class Origin(NamedTuple):
    """What every contender of one case starts from; it is never changed."""

    case: Case
    precision: Precision
    device: torch.device
    params: list[Tensor]
    grads: list[Tensor]

    @property
    def eps(self) -> float:
        """Adam's epsilon in this case."""
        return CHAIN_EPS if self.case.chain else EPS


def make_origin(case: Case, precision: Precision, device: torch.device) -> Origin:
    """Draw normal parameters and gradients, the same ones each time."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(std: float) -> list[Tensor]:
        return [
            torch.empty(shape, dtype=precision.param, device=device).normal_(std=std, generator=generator)
            for shape in case.shapes
        ]

    # Initial weights of a model are about this large; bf16 resolves steps of LR in them.
    return Origin(case, precision, device, draw(0.02), draw(LOSS_SCALE if case.chain else 1.0))


class Workload:
    """One contender's own parameters, their gradients, and its schedule.

    Attributes:
        origin: what they are copies of.
        params: leaves with gradients.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.params = [torch.nn.Parameter(tensor.clone()) for tensor in origin.params]
        for param, grad in zip(self.params, origin.grads, strict=True):
            param.grad = grad.clone()
        self._scheduled: list[dict[str, Any]] = []
        self._n_steps = 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups, with one learning rate each; new ones each time, as optimizers write into them."""
        n_groups = self.origin.case.n_groups
        return [
            {"params": self.params[first:end], "lr": lr_of(i, n_groups)}
            for i, (first, end) in enumerate(group_bounds(len(self.params), n_groups))
        ]

    def schedule(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the learning rates of this optimizer before each step."""
        self._scheduled = optimizer.param_groups

    def before_step(self) -> None:
        """What a backward pass and a scheduler would do, outside of the time that is measured."""
        self._n_steps += 1
        case = self.origin.case
        for i, (param, grad) in enumerate(zip(self.params, self.origin.grads, strict=True)):
            if case.kept and param.grad is not None:
                param.grad.copy_(grad)
                continue
            # The old gradient is still there: the new one has another address.
            param.grad = grad.clone() if has_grad(case, i, self._n_steps) else None
        for i, group in enumerate(self._scheduled):
            lr = lr_of(i, case.n_groups, self._n_steps)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def has_grad(case: Case, index: int, n_steps: int) -> bool:
    """Whether a parameter has a gradient at a step: all at the first one, then half of them if they change."""
    return not case.changing or n_steps == 1 or Random(f"{index} {n_steps}").random() < 0.5


def group_bounds(n_params: int, n_groups: int) -> list[tuple[int, int]]:
    """First parameter and end of each group, all about equally large."""
    return list(pairwise(n_params * i // n_groups for i in range(n_groups + 1)))


def lr_of(group: int, n_groups: int, n_steps: int = 0) -> float:
    """The learning rate of a group: LR for a single one, else another for each; smaller after each step."""
    return LR * (1 + group / n_groups) * DECAY**n_steps
