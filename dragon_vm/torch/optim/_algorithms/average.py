"""The exponential moving average (ema) of parameters."""

from __future__ import annotations

from torch import Tensor


def average_update(ema: Tensor, param: Tensor, decay: float) -> Tensor:
    """The average after a step, out of place.

    Args:
        ema: the average, real, fp32 or fp64.
        param: the parameter as it is stored, in the dtype of the average.
        decay: what stays of the average, at least 0 and below 1.
    """
    return ema + (1 - decay) * (param - ema)
