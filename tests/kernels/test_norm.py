import math

import pytest
import torch
from torch import Tensor

from dragon.kernels import table
from dragon.kernels.norm import INF_NORM, L2_NORM, SPAN

from .tables import Row, Tables, name_of, place

L2, INF = L2_NORM.value, INF_NORM.value
NAN = float("nan")


def partials_of(grads: list[Tensor], order: int, **group: float) -> list[float]:
    """What `norm_kernel` writes for gradients of one group."""
    columns = {getattr(table, name): value for name, value in group.items()}
    tables = Tables([Row(grad=grad) for grad in grads], [columns], device=grads[0].device)
    tables.reduce(order, name_of(grads[0].dtype))
    return tables.partials.tolist()


def norm_of(grads: list[Tensor], order: int, **group: float) -> float:
    """The norm that `advance_kernel` reports for gradients of one group."""
    columns = {getattr(table, name): value for name, value in group.items()}
    tables = Tables([Row(grad=grad) for grad in grads], [columns], device=grads[0].device)
    tables.reduce(order, name_of(grads[0].dtype))
    tables.advance("sgd", norm=order)
    return tables.status[table.GRAD_NORM.value].item()


def random_grads(device: torch.device, dtype: torch.dtype = torch.float32, offset: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    numels = (0, 1, 15, 16, 17, 1000, 1024, 1025, 1040, 2049, 0)
    return [place(torch.randn(n, generator=generator).to(device, dtype), offset) for n in numels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_element_enters_its_partial_result_once(device, dtype, offset):
    grads = random_grads(device, dtype, offset)
    sums = partials_of(grads, L2)
    largest = partials_of(grads, INF)
    for grad, total, peak in zip((g for g in grads if len(g)), sums, largest, strict=True):
        assert total == pytest.approx((grad.double() ** 2).sum().item(), rel=1e-14)
        assert peak == grad.double().abs().max().item()


@pytest.mark.parametrize("offset", [0, 1])
def test_elements_around_the_border_of_a_span_are_in_one_span_each(device, offset):
    grad = place(torch.zeros(SPAN.value + 18, device=device), offset)
    grad[SPAN.value - 1] = 2
    grad[SPAN.value] = 3
    grad[-1] = 4
    assert partials_of([grad], L2) == [4.0, 25.0]
    assert partials_of([grad], INF) == [2.0, 4.0]


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38])
def test_squares_neither_overflow_nor_vanish(device, size):
    grads = [place(torch.full((n,), size, device=device)) for n in (100, 21)]
    size = grads[0][0].item()
    assert norm_of(grads, L2) == pytest.approx(size * 11, rel=1e-14)
    assert norm_of(grads, INF) == size


@pytest.mark.parametrize("order", [L2, INF])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), NAN])
@pytest.mark.parametrize("offset", [0, 1])
def test_one_bad_element_among_many_shows(device, order, bad, offset):
    grads = random_grads(device, offset=offset)
    grads[7][-1] = bad
    norm = norm_of(grads, order)
    assert math.isnan(norm) if math.isnan(bad) else norm == float("inf")


@pytest.mark.parametrize("order", [L2, INF])
def test_nan_wins_over_inf(device, order):
    grads = random_grads(device)
    grads[2][0], grads[7][3], grads[9][1] = float("inf"), NAN, float("inf")
    assert math.isnan(norm_of(grads, order))


def test_the_factor_of_a_group_scales_its_gradients_whatever_its_sign(device):
    grads = random_grads(device)
    assert norm_of(grads, L2, GRAD_FACTOR=-0.5) == pytest.approx(norm_of(grads, L2) / 2, rel=1e-15)
    assert norm_of(grads, INF, GRAD_FACTOR=-0.5) == norm_of(grads, INF) / 2


def test_more_partial_results_than_one_pass_takes_are_combined(device):
    grads = [place(torch.full((1,), float(i), device=device)) for i in range(1100)]
    tables = Tables([Row(grad=grad) for grad in grads], device=device)
    # What `norm_kernel` would write, without a thousand launches of it.
    tables.partials.copy_(torch.arange(1100, device=device).double() ** 2)
    tables.advance("sgd", norm=L2)
    assert tables.status[table.GRAD_NORM.value].item() == math.sqrt(sum(i * i for i in range(1100)))


def test_no_gradients_have_the_norm_zero(device):
    empty = torch.empty(0, device=device)
    assert norm_of([empty, empty], L2) == 0
    assert norm_of([empty], INF) == 0


def test_the_same_gradients_give_the_same_bits_beside_any_others(device):
    grads = random_grads(device)
    alone = [partials_of([grad], L2)[0] for grad in grads if len(grad)]
    assert partials_of(grads, L2) == alone
