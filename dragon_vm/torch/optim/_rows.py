"""Parameter groups as rows of the kernels' hyperparameter and source tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dragon.kernels import table
from dragon.vm.torch.optim._chain import clip_value, group_factor
from dragon.vm.torch.optim._options import Settings

_SOURCES = ((table.LR_SOURCE, "lr", None), (table.BETA1_SOURCE, "betas", 0), (table.BETA2_SOURCE, "betas", 1))


def group_row(group: dict[str, Any], algorithm: str, settings: Settings) -> list[float]:
    """A group's row of the hyperparameter table; tensors on a device stand in the source table instead."""
    row = [0.0] * int(table.GROUP_COLUMNS)
    row[table.LR] = _host_number(group["lr"])
    row[table.WEIGHT_DECAY] = float(group["weight_decay"])
    row[table.GRAD_FACTOR] = group_factor(group)
    row[table.CLIP_VALUE] = clip_value(group)
    row[table.CLIP_NORM] = float(group["clip_norm"])
    row[table.MAX_GRAD_NORM] = float(settings.max_grad_norm)
    row[table.EMA_DECAY] = float(group["ema_decay"])
    row[table.SKIP_NONFINITE] = float(settings.skip_nonfinite)
    if algorithm == "adam":
        row[table.DECOUPLED] = float(group["decoupled_weight_decay"])
        row[table.BETA1], row[table.BETA2] = map(_host_number, group["betas"])
        row[table.EPS] = float(group["eps"])
        row[table.EPSILON_HAT] = float(group["epsilon_hat"])
    else:
        row[table.MOMENTUM] = float(group["momentum"])
        row[table.DAMPENING] = float(group["dampening"])
        row[table.NESTEROV] = float(group["nesterov"])
    return row


def _host_number(value: Any) -> float:
    return 0.0 if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def source_row(group: dict[str, Any], device: torch.device) -> list[int]:
    """Addresses of a group's hyperparameters that are tensors on the device, 0 for the others.

    Raises:
        ValueError: for a tensor of another device or dtype than the kernels can read.
    """
    row = [0] * int(table.SOURCE_COLUMNS)
    for column, key, index in _SOURCES:
        value = group.get(key) if index is None else group.get(key, (None, None))[index]
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            continue
        if value.device != device or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{key} must be a number, or a float32 or float64 tensor on {device} or the CPU, "
                f"but got {value.dtype} on {value.device}"
            )
        row[column] = value.data_ptr() | (value.dtype == torch.float64)
    return row
