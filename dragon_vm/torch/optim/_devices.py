"""What devices differ in, beside their speed."""

from __future__ import annotations

from functools import cache

import torch


def has_addresses(device: torch.device) -> bool:
    """Whether `data_ptr` is where a tensor lies, on a device that has tensors with memory.

    On others it may be a handle with an offset, as that of a Metal buffer: two tell where tensors lie within one
    storage only.
    """
    return device.type in ("cpu", "cuda", "xpu")


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device is known to compute in fp64. Apple's GPUs, some of Intel's and some accelerators do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type in ("cpu", "cuda")
