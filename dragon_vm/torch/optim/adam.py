"""Adam and AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dragon.vm.torch.optim._algorithms.adam import ADAM
from dragon.vm.torch.optim._hints import with_hints
from dragon.vm.torch.optim._options import given
from dragon.vm.torch.optim.optimizer import Optimizer

StateDtypes = torch.dtype | str | Mapping[str, torch.dtype | str | None] | None


class Adam(Optimizer, torch.optim.Adam):
    r"""The optimizer to apply Adam algorithm. `[Kingma & Ba, 2014] <https://arxiv.org/abs/1412.6980>`_.

    .. math::
        \text{Adam}(g) = \text{lr} \cdot \frac{\text{correction} \cdot m_t}{\sqrt{v_t} + \epsilon}, \quad
        \text{correction} = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}

    It replaces `torch.optim.Adam`, is an instance of it, and does the same for PyTorch's parameters. Groups of
    Dragon's own parameters follow Dragon: `eps` is added to the square root of the *uncorrected* second moment,
    the epsilon-hat of section 2 of the paper, and `zero_grad` zeroes by default.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the first and the second moment.
        eps: added to the denominator.
        weight_decay: L2 penalty.
        amsgrad: use the AMSGrad variant.
        maximize: step along the gradient instead of against it.
        foreach: accepted as PyTorch's; the update is always fused.
        capturable: let steps be captured in CUDA graphs, whose replays see changed hyperparameters.
        differentiable: let autograd see the update, with plain torch operations.
        fused: True lets a `GradScaler` leave unscaling and skipping to the step, as with PyTorch.
        decoupled_weight_decay: decay the parameter itself, as AdamW does.
        epsilon_hat: add `eps` to the square root of the uncorrected second moment; None decides by the parameters
            of each group.
        grad_scale: positive factor of the gradients, per group.
        clip_norm: largest L2 norm of each gradient after `grad_scale`, per group; 0 for no limit.
        clip_value: largest magnitude of a gradient's elements, per group, if `clip_norm` is 0; 0 for no limit.
        ema_decay: keep an exponential moving average of the parameters with this decay, per group; 0 for none.
        max_grad_norm: largest norm of all gradients together; 0 for no limit.
        norm_type: 2 or infinity, the norm that `max_grad_norm` bounds.
        skip_nonfinite: skip a step in which some gradient is infinite or NaN.
        state_dtype: dtype of the states, "8bit", or one of both for each state by name, per group; None for the
            parameter's, or fp32 beside a master. Small and odd tensors keep fp32 instead of 8 bits.
        stochastic_rounding: per group: None rounds so the second moments that `state_dtype` makes narrow, and
            masters of 24 bits; True also bf16 parameters; False nothing.
        master_weights: masters of 16-bit parameters, per group: `torch.float32`, or None. For bf16 also "split16",
            which has the same bits in 4 bytes, and "split8", 24 of them in 3 bytes.
        rounding_seed: decides the random bits, from 0 to 2**63 - 1.
        native_state_dict: let `state_dict` return what is stored instead of fp32. PyTorch reads no 8-bit codes.
        backend: "triton", "native", "eager", or None to choose.
        flatten: on the CPU, move small parameters and their states into flat buffers, which are updated as one
            tensor each.
        process_group: processes that hold other parts of the model than meshes say, over which norms and decisions
            to skip are summed; for FSDP1, ZeroRedundancyOptimizer, pipeline stages and tensor parallelism by hand.
            A `GradScaler` leaves unscaling to the step then: call its `step` on all, and leave `unscale_` out.
        release_gradients: update parameters in the backward pass, bucket by bucket, and free their gradients. Each
            backward pass needs a step. In place of True, give the `GradScaler` that scales the loss, if there is
            one: it skips each bucket with infinite or NaN gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as PyTorch; for an option out of range, one that names it.
    """

    _algorithm = ADAM
    _counterpart = torch.optim.Adam

    @with_hints
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        epsilon_hat: bool | None = None,
        grad_scale: float = 1.0,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
        ema_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        state_dtype: StateDtypes = None,
        stochastic_rounding: bool | None = None,
        master_weights: torch.dtype | str | None = None,
        rounding_seed: int = 0,
        native_state_dict: bool = False,
        backend: str | None = None,
        flatten: bool = False,
        process_group: Any = None,
        release_gradients: bool | torch.amp.GradScaler = False,
    ) -> None:
        Optimizer.__init__(self, params, given(locals()))


class AdamW(Adam, torch.optim.AdamW):
    """Adam with decoupled weight decay. `[Loshchilov & Hutter, 2019] <https://arxiv.org/abs/1711.05101>`_.

    It replaces `torch.optim.AdamW`; see `Adam` for what differs and for the arguments.
    """

    @with_hints
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        epsilon_hat: bool | None = None,
        grad_scale: float = 1.0,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
        ema_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        state_dtype: StateDtypes = None,
        stochastic_rounding: bool | None = None,
        master_weights: torch.dtype | str | None = None,
        rounding_seed: int = 0,
        native_state_dict: bool = False,
        backend: str | None = None,
        flatten: bool = False,
        process_group: Any = None,
        release_gradients: bool | torch.amp.GradScaler = False,
    ) -> None:
        if not decoupled_weight_decay:
            raise ValueError("decoupled_weight_decay must be True for AdamW; Adam takes False")
        Optimizer.__init__(self, params, given(locals()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As `Adam`; whatever was saved, decay stays decoupled."""
        for group in state.get("param_groups", ()):
            group["decoupled_weight_decay"] = True
        super().__setstate__(state)


if Adam.__doc__ and AdamW.__doc__:
    # `help` shows the arguments of both. Python 3.13 cuts the indentation of docstrings, and earlier ones keep it.
    _own, _all = inspect.cleandoc(AdamW.__doc__), inspect.cleandoc(Adam.__doc__)
    AdamW.__doc__ = _own + "\n\n" + _all[_all.index("Args:\n") :]
