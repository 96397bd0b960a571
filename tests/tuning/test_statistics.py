"""Gains are of pairs, and equals are told apart once in a thousand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.tuning.statistics import FEWEST_PAIRS, SMALLEST_GAIN, compare, median, quantile

TIMES = st.lists(st.floats(0.01, 100), min_size=1, max_size=30)


@given(TIMES, st.floats(0, 1))
def test_a_quantile_lies_among_the_values(values: list[float], share: float) -> None:
    assert min(values) <= quantile(values, share) <= max(values) * (1 + 1e-12)


@given(TIMES)
def test_as_many_values_lie_below_the_median_as_above(values: list[float]) -> None:
    middle = median(values)
    assert sum(v < middle for v in values) <= len(values) / 2
    assert sum(v > middle for v in values) <= len(values) / 2


def noisy_pairs(gain: float, noise: float, seed: int, n_pairs: int = 41) -> list[tuple[float, float]]:
    generator = random.Random(seed)
    return [(generator.gauss(1, noise), (1 - gain) * generator.gauss(1, noise)) for _ in range(n_pairs)]


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.1])
def test_equals_are_almost_never_told_apart(noise: float) -> None:
    real = sum(compare(noisy_pairs(0.0, noise, seed)).is_real for seed in range(500))
    assert real <= 3


def test_a_gain_of_thrice_the_noise_is_found_nearly_always() -> None:
    assert sum(compare(noisy_pairs(0.06, 0.02, seed)).is_real for seed in range(200)) >= 195


def test_a_gain_that_is_certain_but_tiny_is_not_worth_it() -> None:
    assert not compare([(1.0, 1.0 - SMALLEST_GAIN / 2)] * 100).is_real


@pytest.mark.parametrize("n_pairs", range(FEWEST_PAIRS))
def test_few_pairs_decide_nothing(n_pairs: int) -> None:
    assert not compare([(1.0, 0.1)] * n_pairs).is_real


def test_a_drift_that_both_share_is_no_noise() -> None:
    pairs = [(drift, 0.9 * drift) for drift in (1.0, 3.0, 2.0, 9.0, 5.0) * 4]
    assert compare(pairs).is_real
    assert compare(pairs).noise == pytest.approx(0, abs=1e-12)
