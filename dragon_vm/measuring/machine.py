"""Names of devices and versions of packages, as results and measurements record them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """A GPU.

    Attributes:
        device: for torch.
        name: as the driver calls it.
        arch: as in "sm_90".
        n_processors: multiprocessors.
        warp_size: threads of a warp.
    """

    device: torch.device
    name: str
    arch: str
    n_processors: int
    warp_size: int


# Kernels that run in triton's interpreter, on CPU tensors.
INTERPRETER = Machine(torch.device("cpu"), "interpreter", "interpreter", 2, 32)


def present_gpu() -> Machine | None:
    """The current CUDA or ROCm device; None if there is none."""
    if not torch.cuda.is_available():
        return None
    # Imports triton, which takes most of a second.
    from dragon.vm.torch.optim._backends.context import describe

    device = torch.device("cuda", torch.cuda.current_device())
    return Machine(device, *describe(device))


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def versions(distributions: Sequence[str] = ("torch", "triton")) -> dict[str, str]:
    """Versions of the distributions that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
