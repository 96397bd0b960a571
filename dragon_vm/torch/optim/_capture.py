"""CUDA graphs: which steps cannot be captured, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import is_dense
from dragon.vm.torch.optim._local import local
from dragon.vm.torch.optim._owner import Owner


def is_capturing() -> bool:
    """Whether what is launched now goes into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_live(group: Mapping[str, Any]) -> None:
    """Check that graphs see a group's hyperparameters change.

    Raises:
        RuntimeError: for one that is a tensor on the CPU.
    """
    for name in group.keys() - {"params"}:
        value = group[name]
        values = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
            raise RuntimeError(
                f"{name} is a tensor on the CPU, which a graph's replay would not see change: "
                "give a number, or for lr and betas a tensor on the parameters' device"
            )


def check_capture(optimizer: Owner, params: list[Tensor], grads: list[Any], has_outside_sums: bool) -> None:
    """Check that a graph of this step would do at each replay what the step does.

    Args:
        optimizer: whose step it is.
        params: its parameters.
        grads: their gradients; None for those that are missing.
        has_outside_sums: whether it uses sums that were gathered before the capture.

    Raises:
        RuntimeError: if it would not, saying why.
    """
    params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
    if not params:
        raise RuntimeError(
            "a step without gradients cannot be captured: its graph would update nothing at each replay; "
            "run backward() within the capture, or before it"
        )
    if has_outside_sums:
        raise RuntimeError(
            "a step cannot be captured that uses sums from before the capture: they end with the step, and a "
            "replay would read what comes in their place; capture sum_grad() too"
        )
    for group in optimizer.param_groups:
        if not group["capturable"]:
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {type(optimizer).__name__} "
                "but param_groups' capturable is False."
            )
        check_live(group)
    backend = optimizer._settings.backend
    if backend in ("native", "eager"):
        raise RuntimeError(
            f"backend={backend!r} cannot be captured: it reads numbers on the host, which a replay does not repeat"
        )
    owner = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    for param in params:
        if param.device.type == "cpu" or owner[id(param)]["differentiable"] or not is_dense(local(param)):
            reason = "on the CPU" if param.device.type == "cpu" else "differentiable or not dense"
            raise RuntimeError(f"a step cannot be captured whose parameters are {reason}: no kernel updates them")
