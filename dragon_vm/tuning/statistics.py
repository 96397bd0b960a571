"""Medians, spreads, and what is more than noise. Plain numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Standard errors by which a gain must exceed zero: one in a thousand of equals passes by chance.
CONFIDENCE = 3.0

# A smaller gain is not worth another configuration than the default.
SMALLEST_GAIN = 0.01

# Fewer pairs than this decide nothing.
FEWEST_PAIRS = 9

# Of a normal distribution: between the 20th and 80th percentile, and the standard error of a median of n values
# (times the square root of n), both in standard deviations.
_SPREAD, _MEDIAN_ERROR = 1.683, 1.2533


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    """The median."""
    return quantile(values, 0.5)


class Gain(NamedTuple):
    """How much faster one configuration is than another, as a share of the other's time.

    Attributes:
        gain: the median over pairs; negative if it is slower.
        noise: what a gain of equals stays below; infinite for too few pairs.
    """

    gain: float
    noise: float

    @property
    def is_real(self) -> bool:
        """Whether the gain exceeds the noise, and is worth it."""
        return self.gain > max(self.noise, SMALLEST_GAIN)


def compare(pairs: Sequence[tuple[float, float]]) -> Gain:
    """The gain of the second over the first, from times taken next to each other.

    Pairs, so that a clock that drifts takes both along; percentiles, so that a single outlier is none.
    """
    if not pairs:
        return Gain(0.0, math.inf)
    gains = [1 - second / first for first, second in pairs]
    if len(gains) < FEWEST_PAIRS:
        return Gain(median(gains), math.inf)
    sigma = (quantile(gains, 0.8) - quantile(gains, 0.2)) / _SPREAD
    return Gain(median(gains), CONFIDENCE * _MEDIAN_ERROR * sigma / math.sqrt(len(gains)))
