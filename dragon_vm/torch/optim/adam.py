"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from dragon.vm.torch.optim._options import GROUP_DEFAULTS, AdamOptions, check_betas, check_lr, split_options
from dragon.vm.torch.optim._takeover import take_over
from dragon.vm.torch.optim.optimizer import Optimizer

_DEFAULTS = {**GROUP_DEFAULTS, "decoupled_weight_decay": False, "epsilon_hat": True}


class Adam(Optimizer):
    r"""The optimizer to apply Adam algorithm. `[Kingma & Ba, 2014] <https://arxiv.org/abs/1412.6980>`_.

    .. math::
        \text{Adam}(g) = \text{lr} \cdot \frac{\text{correction} \cdot m_t}{\sqrt{v_t} + \epsilon}, \quad
        \text{correction} = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}

    It takes the place of `torch.optim.Adam`, from which it differs in this: `eps` is added to the square root of
    the *uncorrected* second moment, the epsilon-hat of section 2 of the paper, unless ``epsilon_hat=False``; all
    groups are updated by one launch; `zero_grad` zeroes by default.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the first and the second moment.
        eps: added to the denominator.
        weight_decay: L2 penalty.
        amsgrad: use the AMSGrad variant.
        **kwargs: see `AdamOptions`.

    Raises:
        TypeError, ValueError, RuntimeError: as PyTorch; for an option out of range, one that names it.
    """

    _algorithm = "adam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        **kwargs: Unpack[AdamOptions],
    ) -> None:
        options, settings = split_options(type(self).__name__, kwargs, _DEFAULTS)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            **options,
        }
        check_lr(defaults)
        check_betas(defaults)
        super().__init__(params, defaults, settings)

    @classmethod
    def from_torch(cls, optimizer: torch.optim.Optimizer, **kwargs: Unpack[AdamOptions]) -> Self:
        """Take over a running `torch.optim.Adam` or `AdamW`: its groups, hyperparameters, state and epsilon.

        Args:
            optimizer: it keeps its state, but is not to update the same parameters any more.
            **kwargs: see `AdamOptions`.

        Raises:
            TypeError: for an optimizer of another algorithm.
            ValueError: for a state that does not fit, and for an `AdamW` of one whose decay is not decoupled.
        """
        kwargs.setdefault("epsilon_hat", False)
        return take_over(cls, optimizer, torch.optim.Adam, {**kwargs})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_lr(group)
        check_betas(group)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        return (*keys, "ema") if group["ema_decay"] else keys

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        return True


class AdamW(Adam):
    """Adam with decoupled weight decay. `[Loshchilov & Hutter, 2019] <https://arxiv.org/abs/1711.05101>`_.

    It takes the place of `torch.optim.AdamW`; see `Adam` for what differs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        **kwargs: Unpack[AdamOptions],
    ) -> None:
        if not kwargs.setdefault("decoupled_weight_decay", True):
            raise ValueError("decoupled_weight_decay must be True for AdamW; Adam takes False")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As `Adam`; whatever was saved, decay stays decoupled."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
