import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from dragon.kernels import launch, table
from dragon.kernels.archs import sum_dtype
from dragon.kernels.norm import INF_NORM, L2_NORM, SPAN, TILE, TILES_IN_FLIGHT
from dragon.kernels.tile import VECTOR_NUMEL

from .tables import Row, Tables, name_of, place

L2, INF = L2_NORM.value, INF_NORM.value
NAN = float("nan")
SUM_DTYPES = ("float64", "float32")
# Of 4,000 random numbers those of which the norm of a span of equal elements is worst.
EQUAL = (1.8181209564208984, 1.2748074531555176, 1.4150524139404297)


def reduced(grads: list[Tensor], order: int, sum_dtype: str, group: dict[str, float]) -> Tables:
    columns = {getattr(table, name): value for name, value in group.items()}
    tables = Tables([Row(grad=grad) for grad in grads], [columns], device=grads[0].device)
    tables.reduce(order, name_of(grads[0].dtype), sum_dtype)
    return tables


def partials_of(grads: list[Tensor], order: int, sum_dtype: str = "float64", **group: float) -> list[float]:
    """What `norm_kernel` writes for gradients of one group."""
    return reduced(grads, order, sum_dtype, group).partials.tolist()


def norm_of(grads: list[Tensor], order: int, sum_dtype: str = "float64", **group: float) -> float:
    """The norm that `advance_kernel` reports for gradients of one group."""
    tables = reduced(grads, order, sum_dtype, group)
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
        assert total == pytest.approx((grad.double() ** 2).sum().item(), rel=1e-14, abs=0)
        assert peak == grad.double().abs().max().item()


@pytest.mark.parametrize("offset", [0, 1])
def test_elements_around_the_border_of_a_span_are_in_one_span_each(device, offset):
    grad = place(torch.zeros(SPAN.value + 18, device=device), offset)
    grad[SPAN.value - 1] = 2
    grad[SPAN.value] = 3
    grad[-1] = 4
    assert partials_of([grad], L2) == [4.0, 25.0]
    assert partials_of([grad], INF) == [2.0, 4.0]


@np.errstate(over="ignore")  # of sums that are not used then
@pytest.mark.parametrize("sum_dtype", SUM_DTYPES)
@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38, 1e-40])
def test_squares_neither_overflow_nor_vanish(device, size, sum_dtype):
    grads = [place(torch.full((n,), size, device=device)) for n in (100, 21)]
    size = grads[0][0].item()
    assert norm_of(grads, L2, sum_dtype) == pytest.approx(size * 11, rel=1e-14, abs=0)
    assert norm_of(grads, INF, sum_dtype) == size


@pytest.mark.parametrize("sum_dtype", SUM_DTYPES)
@pytest.mark.parametrize("order", [L2, INF])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), NAN])
@pytest.mark.parametrize("offset", [0, 1])
def test_one_bad_element_among_many_shows(device, order, bad, offset, sum_dtype):
    grads = random_grads(device, offset=offset)
    grads[7][-1] = bad
    norm = norm_of(grads, order, sum_dtype)
    assert math.isnan(norm) if math.isnan(bad) else norm == float("inf")


@pytest.mark.parametrize("sum_dtype", SUM_DTYPES)
@pytest.mark.parametrize("order", [L2, INF])
def test_nan_wins_over_inf(device, order, sum_dtype):
    grads = random_grads(device)
    grads[2][0], grads[7][3], grads[9][1] = float("inf"), NAN, float("inf")
    assert math.isnan(norm_of(grads, order, sum_dtype))


@pytest.mark.parametrize("sum_dtype", SUM_DTYPES)
def test_the_factor_of_a_group_scales_its_gradients_whatever_its_sign(device, sum_dtype):
    grads = random_grads(device)
    halved = norm_of(grads, L2, sum_dtype, GRAD_FACTOR=-0.5)
    assert halved == pytest.approx(norm_of(grads, L2, sum_dtype) / 2, rel=1e-15, abs=0)
    assert norm_of(grads, INF, GRAD_FACTOR=-0.5) == norm_of(grads, INF) / 2


def test_more_partial_results_than_one_pass_takes_are_combined(device):
    grads = [place(torch.full((1,), float(i), device=device)) for i in range(1100)]
    tables = Tables([Row(grad=grad) for grad in grads], device=device)
    # What `norm_kernel` would write, without a thousand launches of it.
    tables.partials.copy_(torch.arange(1100, device=device).double() ** 2)
    tables.advance("sgd", norm=L2)
    assert tables.status[table.GRAD_NORM.value].item() == math.sqrt(sum(i * i for i in range(1100)))


@pytest.mark.parametrize("order", [L2, INF])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_partial_result_that_is_no_number_shows_whatever_its_sign(device, sign, order):
    tables = Tables([Row(grad=place(torch.ones(1, device=device))) for _ in range(3)], device=device)
    tables.partials.copy_(torch.tensor([5.0, math.copysign(NAN, sign), 7.0], dtype=torch.float64))
    tables.advance("sgd", norm=order)
    assert math.isnan(tables.status[table.GRAD_NORM.value].item())


def test_no_gradients_have_the_norm_zero(device):
    empty = torch.empty(0, device=device)
    assert norm_of([empty, empty], L2) == 0
    assert norm_of([empty], INF) == 0


def test_the_same_gradients_give_the_same_bits_beside_any_others(device):
    grads = random_grads(device)
    alone = [partials_of([grad], L2)[0] for grad in grads if len(grad)]
    assert partials_of(grads, L2) == alone


def in_lanes_of_float32(grad: Tensor) -> np.ndarray:
    """The same in float32: of each few tiles first, and of what is behind the last whole vector at the end."""
    values = grad.float().cpu().numpy()
    whole = len(values) // VECTOR_NUMEL.value * VECTOR_NUMEL.value
    rest = np.zeros(TILE.value, np.float32)
    rest[np.arange(whole, len(values)) % TILE.value] = values[whole:]
    tiles = np.pad(values[:whole], (0, -whole % (TILES_IN_FLIGHT.value * TILE.value)))
    sums = np.zeros(TILE.value, np.float32)
    for few in tiles.reshape(-1, TILES_IN_FLIGHT.value, TILE.value):
        squares = np.zeros(TILE.value, np.float32)
        for tile in few:
            squares = squares + tile * tile
        sums = sums + squares
    return (sums + rest * rest).astype(np.float64)


def in_lanes(grad: Tensor) -> np.ndarray:
    """The sums of a span's lanes: lane i adds the squares of elements i, i + TILE, ... in this order."""
    values = grad.double().cpu().numpy()
    values = np.pad(values, (0, -len(values) % TILE.value)).reshape(-1, TILE.value)
    sums = np.zeros(TILE.value)
    with np.errstate(invalid="ignore"):
        for tile in values:
            sums = sums + tile * tile
    return sums


def bits_of(values: list[float]) -> list[int]:
    return np.array(values).view(np.int64).tolist()


@pytest.mark.usefixtures("interpreted")  # the order in which lanes are added up is the compiler's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_partial_result_has_the_bits_of_the_reference_order(device, dtype, offset):
    generator = torch.Generator().manual_seed(11)
    numels = (1, 15, 16, 17, 1000, 1024, 1039, 4096, 4100, 5121, 32755, 32768, 40000)
    # Over so many binades that most additions are rounded, squares of bf16 among them.
    values = [
        torch.randn(n, generator=generator) * 2.0 ** torch.randint(-12, 13, (n,), generator=generator)
        for n in numels
    ]
    grads = [place(value.to(device, dtype), offset) for value in values]
    spans = [span for grad in grads for span in grad.split(SPAN.value)]
    expected = [np.sum(in_lanes(span)) * 0.37 * 0.37 for span in spans]
    assert bits_of(partials_of(grads, L2, GRAD_FACTOR=-0.37)) == bits_of(expected)


@pytest.mark.usefixtures("interpreted")  # as above
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_sums_in_float32_have_the_bits_of_their_own_order_wherever_a_gradient_starts(device, dtype, offset):
    generator = torch.Generator().manual_seed(12)
    values = [torch.randn(n, generator=generator) for n in (1, 15, 16, 17, 1039, 4096, 5121, 32755, 40000)]
    grads = [place(value.to(device, dtype), offset) for value in values]
    spans = [span for grad in grads for span in grad.split(SPAN.value)]
    expected = [np.sum(in_lanes_of_float32(span)) * 0.37 * 0.37 for span in spans]
    assert bits_of(partials_of(grads, L2, "float32", GRAD_FACTOR=-0.37)) == bits_of(expected)


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**59])
def test_sums_in_float32_are_right_to_three_eps(device, scale):
    # Of equal elements all lanes have the same error; some of these come close to the bound.
    values = [torch.full((SPAN.value,), value * scale) for value in EQUAL]
    values.append(torch.randn(2**17 + 77, generator=torch.Generator().manual_seed(2)) * scale)
    errors = []
    for value in values:
        exact = math.sqrt(math.fsum(element * element for element in value.tolist()))
        errors.append(abs(norm_of([place(value.to(device))], L2, "float32") / exact - 1) / 2.0**-23)
    assert max(errors) <= 3
    assert max(errors) > 0.5, "sums in float64 are better"


@np.errstate(over="ignore")  # of a sum that is not used then
@pytest.mark.parametrize("peak", [2.0**-62, 2.0**-41, 2.0**-40, 2.0**60, 2.0**61, 2.0**63])
def test_a_span_is_right_around_the_ends_of_the_range_of_sums_in_float32(device, peak):
    generator = torch.Generator().manual_seed(5)
    # Of the last one most squares are 2^-24 of the largest.
    small = torch.cat([torch.ones(1), torch.full((4110,), 1.2 * 2.0**-12)])
    for value in (torch.rand(4111, generator=generator), torch.ones(4111), small):
        value = (value * peak).nextafter(torch.tensor(math.inf))
        exact = math.sqrt(math.fsum(element * element for element in value.tolist()))
        assert norm_of([place(value.to(device))], L2, "float32") == pytest.approx(exact, rel=3 * 2.0**-23, abs=0)


@np.errstate(over="ignore")  # of a sum that is not used then
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("index", [0, 1500, 5000, 8199])
def test_a_span_is_right_wherever_its_largest_element_is(device, index, offset):
    value = torch.ones(8200)
    value[index] = 2.0**70
    assert norm_of([place(value.to(device), offset)], L2, "float32") == 2.0**70


def test_squares_of_float64_and_largest_values_are_found_in_one_way_everywhere():
    assert launch.norm_constants("float64", L2, "float32") == launch.norm_constants("float64", L2)
    assert launch.norm_constants("float32", INF, "float32") == launch.norm_constants("float32", INF)
    assert launch.norm_constants("float32", L2, "float32") != launch.norm_constants("float32", L2)


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        (("sm_70", "sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950", "cpu", "xpu"), "float64"),
        (("sm_75", "sm_86", "sm_89", "sm_103", "sm_120", "sm_121", "gfx1100", "gfx1201"), "float32"),
    ],
)
def test_squares_are_summed_in_float32_where_float64_is_slow(archs, expected):
    assert {arch: sum_dtype(arch) for arch in archs} == dict.fromkeys(archs, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("lane", [0, 5, 1023])
def test_a_lane_adds_its_elements_in_their_order_the_tail_last(device, dtype, offset, lane):
    # All other lanes are 0, so that the order in which lanes are added up sets no bit.
    # Added to 1 one by one, the small squares would be rounded away.
    grad = torch.zeros(31 * TILE.value + lane + 1, dtype=dtype)
    grad[lane :: TILE.value] = 2.0**-27
    grad[-1] = 1
    assert partials_of([place(grad.to(device), offset)], L2) == [1 + 31 * 2.0**-54]
    assert 1 + 31 * 2.0**-54 > 1 + 2.0**-54


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_l2_norm_of_many_elements_is_right_to_four_eps(device, dtype):
    grad = place(torch.randn(2**17 + 77, generator=torch.Generator().manual_seed(2), dtype=dtype).to(device))
    exact = sum((Fraction(value) ** 2 for value in grad.tolist()), Fraction(0))
    norm = Fraction(norm_of([grad], L2))
    # |norm - root| = |norm^2 - exact| / (norm + root), which is at most the following.
    assert abs(norm**2 - exact) / norm**2 <= 2 * 4 * Fraction(2.0**-53)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float64, [1e300, -1.7e308, 5e-324]),
        (torch.float64, [-5e-324, 0.0, -0.0]),
        (torch.float32, [3.4e38, -3.3e38, 1e-45]),
        (torch.float32, [-1e-45, 0.0, -0.0]),
        (torch.bfloat16, [-3e38, 9e-41]),
        (torch.float16, [-65504.0, 6e-8]),
        (torch.float16, [-6e-8, 0.0]),
    ],
)
def test_the_largest_absolute_value_is_exact_up_to_the_ends_of_the_range(device, dtype, values, offset):
    grad = torch.zeros(1100, dtype=dtype)
    grad[1100 - len(values) :] = torch.tensor(values, dtype=dtype)
    largest = grad.double().abs().max().item()
    assert largest > 0
    assert norm_of([place(grad.to(device), offset)], INF) == largest


@pytest.mark.parametrize("order", [L2, INF])
def test_a_span_of_an_empty_gradient_writes_zero(device, order):
    for address in (0, 8):
        tables = Tables([Row(grad=place(torch.ones(4, device=device))), Row(numel=0)], device=device)
        tables.grads[1] = address
        tables.span_table = torch.tensor([(0, 0), (1, 0)], dtype=torch.int32, device=device)
        tables.spans = [(0, 0), (1, 0)]
        tables.partials = torch.full((2,), NAN, dtype=torch.float64, device=device)
        tables.tensors[1, table.FIRST_PARTIAL.value] = 1
        tables.reduce(order)
        assert tables.partials.tolist() == [4.0 if order == L2 else 1.0, 0.0]
