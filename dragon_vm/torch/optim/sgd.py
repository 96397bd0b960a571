"""SGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from dragon.vm.torch.optim._options import GROUP_DEFAULTS, CommonOptions, check_lr, check_momentum, split_options
from dragon.vm.torch.optim._takeover import take_over
from dragon.vm.torch.optim.optimizer import Optimizer


class SGD(Optimizer):
    """The optimizer to apply stochastic gradient descent, with PyTorch's form of momentum.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: factor of the momentum buffer.
        dampening: by how much less than 1 a gradient counts in the buffer.
        weight_decay: L2 penalty.
        nesterov: use Nesterov's momentum.
        **kwargs: see `CommonOptions`.

    Raises:
        TypeError, ValueError, RuntimeError: as PyTorch; for an option out of range, one that names it.
    """

    _algorithm = "sgd"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        **kwargs: Unpack[CommonOptions],
    ) -> None:
        options, settings = split_options(type(self).__name__, kwargs, GROUP_DEFAULTS)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            **options,
        }
        check_lr(defaults)
        check_momentum(defaults)
        super().__init__(params, defaults, settings)

    @classmethod
    def from_torch(cls, optimizer: torch.optim.Optimizer, **kwargs: Unpack[CommonOptions]) -> Self:
        """Take over a running `torch.optim.SGD`: groups, hyperparameters and state.

        Args:
            optimizer: it keeps its state, but is not to update the same parameters any more.
            **kwargs: see `CommonOptions`.

        Raises:
            TypeError: for an optimizer of another algorithm.
            ValueError: for a state that does not fit.
        """
        return take_over(cls, optimizer, torch.optim.SGD, {**kwargs})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_lr(group)
        check_momentum(group)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        keys = ("momentum_buffer",) if group["momentum"] else ()
        return (*keys, "ema") if group["ema_decay"] else keys

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"])
