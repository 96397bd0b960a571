"""How to read an optimizer's state, and by which specification to judge it: one rule an algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .judge import FieldErrors, ParityError, adam_errors, sgd_errors
from .records import AdamOptions, AdamState, SGDOptions, SGDState, StateT
from .wide import real_view

OptionsT = TypeVar("OptionsT", AdamOptions, SGDOptions)


def _copy(tensor: Tensor) -> Tensor:
    return real_view(tensor.detach().clone(memory_format=torch.contiguous_format).cpu())


class Rule(Generic[StateT, OptionsT]):
    """What the harness asks of an algorithm."""

    def snapshot(self, param: Tensor, state: Mapping[str, Any], options: OptionsT, dtype: torch.dtype) -> StateT:
        """Copy a parameter and its state to contiguous CPU tensors; missing states are zeros of `dtype`."""
        raise NotImplementedError

    def errors(
        self,
        start: StateT,
        grad: Tensor,
        after: StateT,
        options: OptionsT,
        compute_dtype: torch.dtype | None,
    ) -> list[FieldErrors]:
        """Measure a step from its own start."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamRule(Rule[AdamState, AdamOptions]):
    """Adam with PyTorch's state: step, exp_avg, exp_avg_sq, and with AMSGrad max_exp_avg_sq."""

    def snapshot(
        self, param: Tensor, state: Mapping[str, Any], options: AdamOptions, dtype: torch.dtype
    ) -> AdamState:
        """Copy a parameter and its Adam state.

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

    def errors(
        self,
        start: AdamState,
        grad: Tensor,
        after: AdamState,
        options: AdamOptions,
        compute_dtype: torch.dtype | None,
    ) -> list[FieldErrors]:
        """Measure an Adam step from its own start."""
        return adam_errors(start, grad, after, options, compute_dtype)


@dataclass(frozen=True)
class SGDRule(Rule[SGDState, SGDOptions]):
    """SGD with PyTorch's state: momentum_buffer, which is absent or None before the first step."""

    def snapshot(
        self, param: Tensor, state: Mapping[str, Any], options: SGDOptions, dtype: torch.dtype
    ) -> SGDState:
        """Copy a parameter and its momentum buffer; a missing buffer stays None, whatever `dtype`."""
        buffer = state.get("momentum_buffer") if options.momentum else None
        return SGDState(_copy(param), None if buffer is None else _copy(buffer))

    def errors(
        self,
        start: SGDState,
        grad: Tensor,
        after: SGDState,
        options: SGDOptions,
        compute_dtype: torch.dtype | None,
    ) -> list[FieldErrors]:
        """Measure an SGD step from its own start."""
        return sgd_errors(start, grad, after, options, compute_dtype)
