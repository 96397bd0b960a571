import math

import pytest
import torch

from dragon.kernels.spec import Spec, has_bound
from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._formats.blockwise import SignedQ8, SquareQ8
from dragon.vm.torch.optim._formats.bound import can_exceed_bound, clamp_moment, moment_bound, rounded_bound
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.rounding import Plain, StochasticBfloat16, UpwardBfloat16

BETAS = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.999), (0.95, 0.9025), (0.9, 0.5), (0.99, 0.9), (0.5, 0.0), (0.9, 0.81)]


def largest_ratio(beta1: float, beta2: float, steps: int) -> float:
    """|m| / sqrt(v) of the gradients for which Cauchy and Schwarz are equal."""
    ages = range(steps)
    gradients = [(beta1 / beta2) ** age for age in ages]
    exp_avg = sum((1 - beta1) * beta1**age * gradient for age, gradient in zip(ages, gradients, strict=True))
    exp_avg_sq = sum((1 - beta2) * beta2**age * gradient**2 for age, gradient in zip(ages, gradients, strict=True))
    return exp_avg / math.sqrt(exp_avg_sq)


@pytest.mark.parametrize(("beta1", "beta2"), [betas for betas in BETAS if betas[1] > 0])
@pytest.mark.parametrize("steps", [1, 2, 10, 200])
def test_the_worst_gradients_reach_the_bound(beta1: float, beta2: float, steps: int) -> None:
    assert moment_bound(beta1, beta2, steps) == pytest.approx(largest_ratio(beta1, beta2, steps), rel=1e-12, abs=0)


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_no_gradients_exceed_it(beta1: float, beta2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exp_avg = exp_avg_sq = torch.zeros(300, dtype=torch.float64)
    for step in range(1, 201):
        gradient = torch.randn(300, generator=generator).double() * 10 ** (
            4 * torch.randn(300, generator=generator)
        )
        gradient[torch.rand(300, generator=generator) < 0.5] = 0
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
        bound = moment_bound(beta1, beta2, step)
        if not math.isinf(bound):
            assert (exp_avg.abs() <= bound * exp_avg_sq.sqrt() * (1 + 1e-12)).all()


def test_known_bounds() -> None:
    assert moment_bound(0.9, 0.999, 10**6) == pytest.approx(7.27, abs=0.005)
    assert moment_bound(0.9, 0.81, 4) == pytest.approx(0.1 * math.sqrt(4 / 0.19))
    assert moment_bound(0.5, 0.0, 1) == 0.5
    assert moment_bound(0.5, 0.0, 2) == math.inf
    assert moment_bound(0.0, 0.0, 2) == 1.0
    assert moment_bound(0.99, 0.5, 10**6) == math.inf
    # r = 1 - 1e-9, where a quotient of differences is 0 by 0 in fp32.
    beta2 = 0.81 * (1 + 1e-9)
    assert moment_bound(0.9, beta2, 100) == pytest.approx(0.1 * math.sqrt(100 / (1 - beta2)), rel=1e-6)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.9, 0.95)])
def test_fp32_moments_of_the_worst_gradients_are_not_cut(beta1: float, beta2: float) -> None:
    steps = 60
    scale = 10 ** torch.linspace(-9, 9, 2001)
    exp_avg = exp_avg_sq = torch.zeros_like(scale)
    for step in range(1, steps + 1):
        gradient = scale * (beta1 / beta2) ** (steps - step)
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
        clamped = clamp_moment(exp_avg, square_root(exp_avg_sq), moment_bound(beta1, beta2, step))
        assert torch.equal(clamped, exp_avg)


def test_what_exceeds_the_bound_is_cut_and_nan_stays() -> None:
    exp_avg = torch.tensor([5.0, -5.0, 1.0, -1.0, torch.nan, 3.0, -torch.inf, 0.0])
    root = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    clamped = clamp_moment(exp_avg, root, 2.0)
    limit = rounded_bound(2.0)
    assert 2 < limit < 2 * (1 + 1e-5)
    assert clamped[:4].tolist() == [limit, -limit, 1.0, -1.0]
    assert clamped[4].isnan()
    assert clamped[5:].tolist() == [0.0, -limit, 0.0]
    assert clamp_moment(exp_avg, root, math.inf) is exp_avg


FP32, FP16, BF16 = map(Plain, (torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((FP32, FP32), False),
        ((BF16, FP32), False),
        ((FP16, FP16), False),
        ((FP32, FP16), False),
        ((FP16, FP32), True),
        ((FP16, BF16, FP32), True),
        ((BF16, StochasticBfloat16()), True),
        ((FP32, FP32, UpwardBfloat16()), True),
        ((SignedQ8(), SquareQ8(False)), True),
        ((SignedQ8(), FP32), True),
    ],
)
def test_host_and_kernels_bound_a_first_moment_beside_the_same_states(
    states: tuple[Format, ...], expected: bool
) -> None:
    assert can_exceed_bound(states) == expected
    assert has_bound(Spec("adam", "float32", "float32", tuple(form.name for form in states))) == expected


def test_a_momentum_has_no_second_moment_that_bounds_it() -> None:
    assert not can_exceed_bound([FP16])


def test_a_bound_is_an_fp32_number_under_any_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        limit = rounded_bound(1 / 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert limit == rounded_bound(1 / 3)
