"""SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dragon.vm.torch.optim._algorithms.sgd import SGD as ALGORITHM
from dragon.vm.torch.optim._hints import with_hints
from dragon.vm.torch.optim._options import given
from dragon.vm.torch.optim.optimizer import Optimizer


class SGD(Optimizer, torch.optim.SGD):
    """The optimizer to apply stochastic gradient descent, with PyTorch's form of momentum.

    It replaces `torch.optim.SGD`, and is an instance of it.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: factor of the momentum buffer.
        dampening: by how much less than 1 a gradient counts in the buffer.
        weight_decay: L2 penalty.
        nesterov: use Nesterov's momentum.
        maximize, foreach, capturable, differentiable, fused: see `Adam`.
        grad_scale, clip_norm, clip_value, ema_decay: see `Adam`.
        max_grad_norm, norm_type, skip_nonfinite, backend, flatten, process_group: see `Adam`.
        state_dtype: dtype of the momentum buffer or "8bit", per group; None for the parameter's, or fp32 beside a
            master.
        master_weights, native_state_dict: see `Adam`; "split8" rounds to nearest here.
        release_gradients: see `Adam`.

    Raises:
        TypeError, ValueError, RuntimeError: as PyTorch; for an option out of range, one that names it.
    """

    _algorithm = ALGORITHM
    _counterpart = torch.optim.SGD

    @with_hints
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        grad_scale: float = 1.0,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
        ema_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master_weights: torch.dtype | str | None = None,
        native_state_dict: bool = False,
        backend: str | None = None,
        flatten: bool = False,
        process_group: Any = None,
        release_gradients: bool | torch.amp.GradScaler = False,
    ) -> None:
        Optimizer.__init__(self, params, given(locals()))
