"""CUDA graphs: which steps cannot be captured, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import is_dense
from dragon.vm.torch.optim._local import local
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
    for group in optimizer.param_groups:
        if not group["capturable"]:
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {type(optimizer).__name__} "
                "but param_groups' capturable is False."
            )
        for name, value in (("lr", group["lr"]), *(("betas", beta) for beta in group.get("betas", ()))):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                raise RuntimeError(
                    f"a step cannot be captured whose {name} is a tensor on the CPU, for a replay would not see "
                    "it change: give a number, or a tensor on the parameters' device"
                )
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
