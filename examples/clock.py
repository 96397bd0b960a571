"""Time a step with all of its work on the device."""

import time
from collections.abc import Callable

import torch


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that `step` takes, with all of its work on the device."""
    _finish(device)
    start = time.perf_counter()
    step()
    _finish(device)
    return (time.perf_counter() - start) * 1e3


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
