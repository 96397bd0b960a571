"""Numbers wider than what is judged: conversion between tensors and extended precision, and the dtype limits.

`numpy.longdouble` has a 64-bit significand on x86-64 (113 bits on aarch64 Linux), so that float64
implementations are judged by something better than themselves. Where it is no more than float64 (Windows,
macOS on arm), float64 parameters are judged by their equal and the last unit of their errors is noise.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WideArray: TypeAlias = npt.NDArray[np.longdouble]


def wide(value: Tensor) -> WideArray:
    """Convert a real tensor of any floating dtype and device, without rounding."""
    return value.detach().cpu().double().numpy().astype(np.longdouble)


def eps(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps


def smallest_subnormal(dtype: torch.dtype) -> float:
    """Return the smallest positive number of `dtype`: no error below it can be seen."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def real_view(tensor: Tensor) -> Tensor:
    """Return a complex tensor as real [..., 2], any other as it is; Adam treats complex numbers as pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
