"""Exchange parameters with their exponential moving averages for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl as without_torch_function


def exchange(state: Mapping[Any, Any], originals: dict[Tensor, Tensor]) -> None:
    """Give each parameter the value of its average, rounded to its dtype.

    Args:
        state: of an optimizer; parameters without an "ema" stay as they are.
        originals: filled with copies of the parameters' own values before the first parameter changes.

    Raises:
        RuntimeError: if no parameter has an average.
    """
    params = [p for p, entries in state.items() if isinstance(entries, Mapping) and "ema" in entries]
    if not params:
        raise RuntimeError("swap_ema() needs averages: give an ema_decay above 0, and take a step")
    averages = [state[param]["ema"] for param in params]
    originals.update(without_torch_function(_copies, (), (params,), {}))
    without_torch_function(_write, (), (params, averages), {})


def restore(originals: dict[Tensor, Tensor]) -> None:
    """Give each parameter its own value back, and forget the copies."""
    without_torch_function(_write, (), (list(originals), list(originals.values())), {})
    originals.clear()


@torch.no_grad()
def _copies(params: list[Tensor]) -> dict[Tensor, Tensor]:
    return {param: param.detach().clone() for param in params}


@torch.no_grad()
def _write(params: list[Tensor], values: list[Tensor]) -> None:
    if params:
        torch._foreach_copy_(params, values)
