"""What the formats do to Adam over many steps: updates stay bounded, and second moments forget."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._formats.blockwise import SignedQ8, SquareQ8
from dragon.vm.torch.optim._formats.bound import clamp_moment, moment_bound
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.philox import Rounding, random_words
from dragon.vm.torch.optim._formats.rounding import Plain, StochasticBfloat16

BETA1, BETA2 = 0.9, 0.999
BF16 = Plain(torch.bfloat16)
MODES: dict[str, tuple[Format, Format]] = {
    "bf16 nearest": (BF16, BF16),
    "bf16 stochastic": (BF16, StochasticBfloat16()),
    "q8 nearest": (SignedQ8(), SquareQ8(False)),
    "q8 stochastic": (SignedQ8(), SquareQ8(True)),
}


def train(
    mode: str, gradients: Iterator[Tensor], numel: int, *, bounded: bool = True
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Both moments as they are used, and the bound, after each step."""
    forms = MODES[mode]
    stored = [
        tuple(torch.zeros(numel // part.elements, dtype=part.dtype) for part in form.parts) for form in forms
    ]
    for step, gradient in enumerate(gradients, 1):
        exp_avg, exp_avg_sq = (form.decode(parts) for form, parts in zip(forms, stored, strict=True))
        exp_avg = BETA1 * exp_avg + (1 - BETA1) * gradient
        exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * gradient * gradient
        bound = moment_bound(BETA1, BETA2, step)
        if bounded:
            exp_avg = clamp_moment(exp_avg, square_root(exp_avg_sq), bound)
        yield exp_avg, exp_avg_sq, bound
        words = random_words([(Rounding(0, 0, step, 0), numel)])[1] if forms[1].stochastic else None
        encoded = forms[0].encode(exp_avg), forms[1].encode(exp_avg_sq, words)
        stored = [
            tuple(value.to(part.dtype) for value, part in zip(values, form.parts, strict=True))
            for form, values in zip(forms, encoded, strict=True)
        ]


def sparse_rows(value: Tensor, step: int, draw: torch.Generator) -> Tensor:
    return value * (torch.rand(value.numel() // 64, generator=draw) < 0.1).repeat_interleave(64)


def sparse_elements(value: Tensor, step: int, draw: torch.Generator) -> Tensor:
    return value * (torch.rand(value.numel(), generator=draw) < 0.1)


def one_in(n: int, large: float, small: float) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    return lambda value, step, draw: value * torch.where(torch.arange(value.numel()) % n == 0, large, small)


HISTORIES: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "one in 64 larger by 1e4": one_in(64, 1e4, 1.0),
    "1e-12": lambda value, step, draw: value * 1e-12,
    "1e-22": lambda value, step, draw: value * 1e-22,
    "1e15": lambda value, step, draw: value * 1e15,
    "sparse rows": sparse_rows,
    "sparse elements": sparse_elements,
    "zeros after step 50": lambda value, step, draw: value * (step < 50),
    "one in 256": one_in(256, 1.0, 0.0),
}


def gradients(history: str, numel: int, steps: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        yield HISTORIES[history](torch.randn(numel, generator=draw), step, draw)


def largest_update(mode: str, history: str, *, bounded: bool) -> float:
    """The largest |m| / (K sqrt(v)): at most 1 for exact Adam."""
    largest = 0.0
    for exp_avg, exp_avg_sq, bound in train(mode, gradients(history, 1024, 150), 1024, bounded=bounded):
        ratio = exp_avg.double().abs() / (bound * exp_avg_sq.double().sqrt())
        largest = max(largest, float(ratio.nan_to_num(0.0).max()))
    return largest


@pytest.mark.parametrize("mode", ["bf16 stochastic", "q8 nearest", "q8 stochastic"])
@pytest.mark.parametrize("history", HISTORIES)
def test_no_update_is_larger_than_exact_adam_could_make_it(mode: str, history: str) -> None:
    assert largest_update(mode, history, bounded=True) <= 1 + 1e-5


def test_without_the_bound_an_update_is_larger() -> None:
    assert largest_update("q8 stochastic", "one in 64 larger by 1e4", bounded=False) > 1.05


def forgotten(mode: str, steps: int) -> float:
    """Median of sqrt(v / exact v) where gradients got 100 times smaller, in blocks of which half did."""
    numel = 1024
    draw = torch.Generator().manual_seed(0)
    quiet = torch.arange(numel) % 2 == 1
    exact = torch.zeros(numel, dtype=torch.float64)
    history = []
    for step in range(1000 + steps):
        gradient = torch.randn(numel, generator=draw)
        history.append(torch.where(quiet & (step >= 1000), 0.01 * gradient, gradient))
        exact = BETA2 * exact + (1 - BETA2) * history[-1].double() ** 2
    *_, (_, exp_avg_sq, _) = train(mode, iter(history), numel)
    return float((exp_avg_sq.double() / exact).sqrt()[quiet].median())


@pytest.mark.parametrize("mode", ["bf16 stochastic", "q8 stochastic"])
def test_a_second_moment_forgets(mode: str) -> None:
    assert 0.85 < forgotten(mode, 4000) < 1.15


@pytest.mark.parametrize("mode", ["bf16 nearest", "q8 nearest"])
def test_rounded_to_nearest_it_cannot(mode: str) -> None:
    # After these steps the root of an exact second moment is 2.7 times smaller.
    assert forgotten(mode, 2000) > 2


@pytest.mark.parametrize(("mode", "tolerance"), [("bf16 stochastic", 0.02), ("q8 stochastic", 0.03)])
def test_a_stationary_second_moment_is_unbiased(mode: str, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    ratios = []
    exact = torch.zeros(2048, dtype=torch.float64)
    history = [torch.randn(2048, generator=draw) for _ in range(2500)]
    for step, (_, exp_avg_sq, _) in enumerate(train(mode, iter(history), 2048)):
        exact = BETA2 * exact + (1 - BETA2) * history[step].double() ** 2
        if step >= 2000 and step % 100 == 0:
            ratios.append((exp_avg_sq.double() / exact).sqrt().mean())
    assert abs(float(torch.stack(ratios).mean()) - 1) < tolerance
