"""The numbers of one update, on the host and in float64."""

from __future__ import annotations

import math


def one_minus_power(base: float, exponent: float) -> float:
    """1 - base**exponent without cancellation, for 0 <= base < 1 and exponent >= 1."""
    return -math.expm1(exponent * math.log(base)) if base > 0 else 1.0
