"""Exchange parameters with their exponential moving averages for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exchanged(state: Mapping[Tensor, Mapping[str, Any]]) -> Iterator[None]:
    """Give each parameter the value of its average, rounded to its dtype; at the end, its own value again.

    Args:
        state: of an optimizer; parameters without an "ema" stay as they are.

    Raises:
        RuntimeError: if no parameter has an average.
    """
    params = [param for param, entries in state.items() if "ema" in entries]
    if not params:
        raise RuntimeError("swap_ema() needs averages: give an ema_decay above 0, and take a step")
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        originals = [param.detach().clone() for param in params]
        torch._foreach_copy_(params, [state[param]["ema"] for param in params])
    try:
        yield
    finally:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            torch._foreach_copy_(params, originals)
