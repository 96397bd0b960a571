"""CUDA graphs: which steps cannot be captured, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import is_dense
from dragon.vm.torch.optim._owner import Owner


def is_capturing() -> bool:
    """Whether what is launched now goes into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(optimizer: Owner, params: Sequence[Tensor]) -> None:
    """Check that a graph of this step would do at each replay what the step does.

    Args:
        optimizer: whose step it is.
        params: its parameters with a gradient.

    Raises:
        RuntimeError: if it would not, saying why.
    """
    if not params:
        raise RuntimeError(
            "a step without gradients cannot be captured: its graph would update nothing at each replay; "
            "run backward() within the capture, or before it"
        )
    backend = optimizer._settings.backend
    if backend in ("native", "eager"):
        raise RuntimeError(
            f"backend={backend!r} cannot be captured: it reads numbers on the host, which a replay does not repeat"
        )
    owner = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    for param in params:
        group = owner[id(param)]
        if param.device.type == "cpu" or group["differentiable"] or not is_dense(param):
            reason = "on the CPU" if param.device.type == "cpu" else "differentiable or not dense"
            raise RuntimeError(f"a step cannot be captured whose parameters are {reason}: no kernel updates them")
        missing = [key for key in optimizer._state_keys(group) if key not in optimizer.state.get(param, {})]
        if missing:
            raise RuntimeError(
                f"a first step cannot be captured: each replay would start {', '.join(missing)} anew; "
                "take a step before the capture, as PyTorch's notes on CUDA graphs do"
            )
