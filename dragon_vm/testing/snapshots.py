"""How to read an optimizer's state: as PyTorch keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .judge import ParityError
from .records import AdamOptions, AdamState, SGDOptions, SGDState
from .wide import real_view


def _copy(tensor: Tensor) -> Tensor:
    return real_view(tensor.detach().clone().cpu())


def adam_snapshot(param: Tensor, state: Mapping[str, Any], options: AdamOptions, dtype: torch.dtype) -> AdamState:
    """Copy a parameter and its state to CPU tensors; missing states are zeros of `dtype`.

    Raises:
        ParityError: The state is there, but not whole.
    """
    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if options.amsgrad else ())
    missing = [name for name in ("step", *names) if state and name not in state]
    if missing:
        raise ParityError(f"no {', '.join(missing)} in the state, which has {', '.join(state)}")
    moments = [_copy(state[name] if state else torch.zeros(param.shape, dtype=dtype)) for name in names]
    maximum = moments[2] if options.amsgrad else None
    return AdamState(_copy(param), float(state.get("step", 0)), moments[0], moments[1], maximum)


def sgd_snapshot(param: Tensor, state: Mapping[str, Any], options: SGDOptions, _dtype: torch.dtype) -> SGDState:
    """Copy a parameter and its momentum buffer; one that is absent, as before the first step, is None."""
    buffer = state.get("momentum_buffer") if options.momentum else None
    return SGDState(_copy(param), None if buffer is None else _copy(buffer))
