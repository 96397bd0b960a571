"""CUDA graphs: which steps cannot be captured, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_capturing() -> bool:
    """Whether what is launched now goes into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_device(device: torch.device) -> None:
    """Check that what is launched on a device now goes into no graph but of CUDA.

    Raises:
        RuntimeError: if it does: later steps would write other addresses to the table that the graph reads.
    """
    # Older PyTorch has no such graphs.
    if device.type == "xpu" and getattr(torch.xpu, "is_current_stream_capturing", bool)():
        raise RuntimeError("a step cannot be captured in an XPU graph, but in CUDA graphs only: take it outside")


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


def check_capture(
    owner: str, groups: Sequence[Mapping[str, Any]], backend: str | None, has_grads: bool, has_outside_sums: bool
) -> None:
    """Check that a graph of this step would do at each replay what the step does.

    `has_outside_sums` tells whether it uses sums of gradients that were gathered before the capture.

    Raises:
        RuntimeError: if it would not, saying why.
    """
    if not has_grads:
        raise RuntimeError(
            "a step without gradients cannot be captured: its graph would update nothing at each replay; "
            "run backward() within the capture, or before it"
        )
    if has_outside_sums:
        raise RuntimeError(
            "a step cannot be captured that uses sums from before the capture: they end with the step, and a "
            "replay would read what comes in their place; capture sum_grad() too"
        )
    for group in groups:
        if not group["capturable"]:
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {owner} "
                "but param_groups' capturable is False."
            )
        check_live(group)
    if backend in ("native", "eager"):
        raise RuntimeError(
            f"backend={backend!r} cannot be captured: it reads numbers on the host, which a replay does not repeat"
        )
