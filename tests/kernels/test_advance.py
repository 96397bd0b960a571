import math
import struct
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dragon.kernels import table
from dragon.kernels.norm import INF_NORM, L2_NORM, NO_NORM

from .tables import Row, Tables, place

L2, INF = L2_NORM.value, INF_NORM.value
NAN, INFINITY = float("nan"), float("inf")
ADAM = {table.LR: 1.0, table.BETA1: 0.9, table.BETA2: 0.999, table.EPS: 1e-8, table.EPSILON_HAT: 1.0}


def counters(device: torch.device, *steps: float, group: int = 0) -> list[Row]:
    """Rows that are nothing but a step counter, with scalars in float64."""
    return [Row(step=torch.tensor(float(s), device=device), group=group, numel=1, wide=True) for s in steps]


def one_minus_power(beta: float, step: int) -> Decimal:
    with localcontext() as context:
        context.prec = 60
        return 1 - Decimal(beta) ** step if beta else Decimal(1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 1e-12, 1 - 2.0**-53])
def test_bias_corrections_are_exact_to_the_last_bits(device, beta):
    steps = (1, 2, 3, 10, 100, 999, 10_000, 10**6)
    rows = counters(device, *(step - 1 for step in steps))
    # With the other beta at 0, the step size is 1 / (1 - beta1**t), and the epsilon sqrt(1 - beta2**t).
    only_beta1 = {**ADAM, table.BETA1: beta, table.BETA2: 0.0}
    only_beta2 = {**ADAM, table.BETA1: 0.0, table.BETA2: beta, table.EPS: 1.0, table.EPSILON_HAT: 0.0}
    tables = Tables(rows, [only_beta1], device=device)
    tables.advance()
    for i, step in enumerate(steps):
        exact = one_minus_power(beta, step)
        assert tables.scalar(i, table.STEP_SIZE) == pytest.approx(float(1 / exact), rel=2e-15, abs=0), step
    tables = Tables(counters(device, *(step - 1 for step in steps)), [only_beta2], device=device)
    tables.advance()
    for i, step in enumerate(steps):
        root = float(one_minus_power(beta, step).sqrt())
        assert tables.scalar(i, table.DENOM_EPS) == pytest.approx(root, rel=2e-15, abs=0), step
        assert tables.scalar(i, table.STEP_SIZE) == pytest.approx(root, rel=2e-15, abs=0), step


@given(
    beta=st.floats(0, 1, exclude_max=True, allow_subnormal=False) | st.sampled_from([0.95, 0.999, 0.9999]),
    step=st.integers(1, 2**20),
)
@example(beta=0.03292688789792986, step=211)  # of which the power is subnormal
def test_any_bias_correction_is_right(device, beta, step):
    tables = Tables(counters(device, step - 1), [{**ADAM, table.BETA1: beta, table.BETA2: 0.0}], device=device)
    tables.advance()
    exact = float(1 / one_minus_power(beta, step))
    assert tables.scalar(0, table.STEP_SIZE) == pytest.approx(exact, rel=2e-15, abs=0)


def test_one_minus_beta_is_taken_in_float64(device):
    tables = Tables(counters(device, 0), [ADAM], device=device)
    tables.advance()
    assert tables.scalar(0, table.ONE_MINUS_BETA1) == 1 - 0.9
    assert tables.scalar(0, table.ONE_MINUS_BETA2) == 1 - 0.999
    assert tables.scalar(0, table.BETA2_FACTOR) == 0.999


def as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def row_in(wide: bool, group: int, device: torch.device) -> Row:
    return Row(step=torch.tensor(4.0, device=device), group=group, numel=1, wide=wide)


@pytest.mark.parametrize(
    ("algorithm", "columns"),
    [
        ("adam", range(table.ONE_MINUS_BETA2.value + 1)),
        (
            "sgd",
            [*range(table.STEP_SIZE.value + 1), *range(table.MOMENTUM_DECAY.value, table.NESTEROV_FLAG.value + 1)],
        ),
        ("accumulate", range(table.ONE_MINUS_EMA_DECAY.value + 1)),
    ],
)
def test_one_launch_writes_float64_scalars_and_their_float32_roundings(device, algorithm, columns):
    group = {
        **ADAM, table.LR: 0.1, table.WEIGHT_DECAY: 0.01, table.CLIP_VALUE: 0.7, table.EMA_DECAY: 0.999,
        table.MOMENTUM: 0.9, table.DAMPENING: 0.3, table.NESTEROV: 1.0, table.GRAD_FACTOR: 0.37,
    }  # fmt: skip
    groups = [group, {**group, table.DECOUPLED: 1.0, table.LR: 0.3, table.BETA1: 0.95}]
    kinds = [(True, 0), (False, 0), (False, 1), (True, 1)] * 40
    tables = Tables([row_in(*kind, device) for kind in kinds], groups, device=device)
    tables.advance(algorithm)
    for low, wide in ((1, 0), (2, 3)):
        for column in columns:
            for first in range(0, 160, 4):
                exact = tables.scalar_row(first + wide)[column].item()
                assert exact == tables.scalar_row(wide)[column].item()
                assert tables.scalar_row(first + low)[column].item() == as_float32(exact), column
    assert tables.scalar(0, table.GRAD_SCALE) == 0.37 != as_float32(0.37)


def test_scalars_in_float32_leave_the_second_half_of_their_row_alone(device):
    tables = Tables([row_in(False, 0, device), row_in(True, 0, device)], [ADAM], device=device)
    tables.advance()
    tables.advance("sgd")
    assert tables.scalars[0, table.SCALAR_COLUMNS.value // 2 :].isnan().all()
    assert not tables.scalars[1, : table.NESTEROV_FLAG.value + 1].isnan().any()


def test_each_tensor_has_its_own_count(device):
    steps = [3.0 * i for i in range(300)]
    rows = counters(device, *steps)
    tables = Tables(rows, [ADAM], device=device)
    tables.advance()
    tables.advance()
    assert [row.step.item() for row in rows] == [step + 2 for step in steps]
    assert not any(map(math.isnan, tables.column(table.STEP_SIZE)))


def test_a_tensor_without_a_counter_is_at_its_first_step(device):
    tables = Tables([Row(numel=1, wide=True)], [ADAM], device=device)
    tables.advance()
    assert tables.scalar(0, table.STEP_SIZE) == pytest.approx((1 - 0.999) ** 0.5 / (1 - 0.9), rel=1e-14, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.3, 0.125, 0.0])
def test_hyperparameters_are_read_from_device_tensors_when_there_are_any(device, dtype, rate):
    lr, beta1, beta2 = (torch.tensor(value, dtype=dtype, device=device) for value in (0.25, 0.5, 0.7))
    sources = {(1, table.LR_SOURCE): lr, (1, table.BETA1_SOURCE): beta1, (1, table.BETA2_SOURCE): beta2}
    rows = counters(device, 0) + counters(device, 0, group=1)
    group = {**ADAM, table.LR: 3.0}
    tables = Tables(rows, [group, group], sources, device=device)
    tables.advance()
    root = (1 - beta2.item()) ** 0.5
    assert tables.scalar(1, table.STEP_SIZE) == pytest.approx(0.25 * root / 0.5, rel=1e-15, abs=0)
    assert tables.scalar(1, table.BETA2_FACTOR) == beta2.item()
    assert tables.scalar(0, table.BETA2_FACTOR) == 0.999
    lr.fill_(rate)
    tables.tensors[:, table.STEP.value] = 0
    tables.advance()
    assert tables.scalar(1, table.STEP_SIZE) == pytest.approx(lr.item() * root / 0.5, rel=1e-15, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_tensor_hyperparameter_leaves_the_others_in_the_table(device, dtype):
    source = {(0, table.BETA2_SOURCE): torch.tensor(0.5, dtype=dtype, device=device)}
    tables = Tables(counters(device, 0), [{**ADAM, table.LR: 3.0}], source, device=device)
    tables.advance()
    assert tables.scalar(0, table.STEP_SIZE) == pytest.approx(3 * 0.5**0.5 / 0.1, rel=1e-14, abs=0)


@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_goes_to_the_gradient_or_to_the_parameter(device, decoupled):
    group = {**ADAM, table.LR: 0.5, table.WEIGHT_DECAY: 0.25, table.DECOUPLED: float(decoupled)}
    tables = Tables(counters(device, 0), [group], device=device)
    tables.advance()
    assert tables.scalar(0, table.L2) == (0 if decoupled else 0.25)
    assert tables.scalar(0, table.DECAY) == (0.875 if decoupled else 1)


def test_clip_values_and_averages_are_those_of_the_group(device):
    rows = counters(device, 0) + counters(device, 0, group=1)
    tables = Tables(rows, [{**ADAM, table.CLIP_VALUE: 2.0, table.EMA_DECAY: 0.75}, ADAM], device=device)
    tables.advance()
    assert [tables.scalar(i, table.CLIP) for i in range(2)] == [2.0, INFINITY]
    assert [tables.scalar(i, table.ONE_MINUS_EMA_DECAY) for i in range(2)] == [0.25, 1.0]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_sgd_damps_all_gradients_but_the_first(device, steps_before):
    group = {table.LR: 0.5, table.MOMENTUM: 0.75, table.DAMPENING: 0.25, table.NESTEROV: 1.0}
    tables = Tables(counters(device, steps_before), [group], device=device)
    tables.advance("sgd")
    columns = (table.STEP_SIZE, table.MOMENTUM_DECAY, table.MOMENTUM_GAIN, table.NESTEROV_FLAG)
    assert [tables.scalar(0, column) for column in columns] == [0.5, 0.75, 0.75 if steps_before else 1.0, 1.0]


@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
@pytest.mark.parametrize("found_inf", [1.0, 2.0])
@pytest.mark.parametrize("norm", [NO_NORM.value, L2])
def test_a_found_infinity_skips_the_step_and_is_counted_once(device, algorithm, found_inf, norm):
    rows = counters(device, *range(260))
    tables = Tables(rows, [ADAM], device=device)
    tables.partials.fill_(1.0)
    tables.found_inf.fill_(found_inf)
    tables.advance(algorithm, norm)
    assert [row.step.item() for row in rows] == list(range(260))
    assert not any(tables.column(table.ACTIVE))
    assert tables.status[table.N_SKIPPED.value] == 1
    tables.found_inf.zero_()
    tables.advance(algorithm)
    assert [row.step.item() for row in rows] == list(range(1, 261))
    assert all(tables.column(table.ACTIVE))
    assert tables.status[table.N_SKIPPED.value] == 1


def clipping_tables(device: torch.device, grads: list[list[float]], group: dict[object, float]) -> Tables:
    rows = [
        Row(grad=place(torch.tensor(values, device=device)), step=torch.zeros((), device=device), wide=True)
        for values in grads
    ]
    return Tables(rows, [{**ADAM, **group}], device=device)


def test_gradients_are_divided_by_their_scale(device):
    tables = clipping_tables(device, [[3.0], [4.0]], {table.GRAD_FACTOR: -0.5})
    tables.grad_scale.fill_(4.0)
    tables.reduce(L2)
    tables.advance(norm=L2)
    assert tables.scalar(0, table.GRAD_SCALE) == -0.125
    assert tables.status[table.GRAD_NORM.value] == 5 * 0.125


@pytest.mark.parametrize(("order", "norm"), [(L2, 5.0), (INF, 4.0)])
@pytest.mark.parametrize("limit", [0.0, 1.0, 10.0])
def test_the_norm_of_all_gradients_is_clipped_as_torch_clips_it(device, order, norm, limit):
    tables = clipping_tables(device, [[3.0], [], [0.0, 4.0]], {table.MAX_GRAD_NORM: limit})
    tables.reduce(order)
    tables.advance(norm=order)
    assert tables.status[table.GRAD_NORM.value] == norm
    factor = min(limit / (norm + 1e-6), 1.0) if limit else 1.0
    assert tables.column(table.GRAD_SCALE) == pytest.approx([factor] * 3, rel=1e-15, abs=0)


@pytest.mark.parametrize("order", [NO_NORM.value, L2])
@pytest.mark.parametrize(("factor", "scale"), [(1.0, 1.0), (-6.0, 3.0)])
def test_each_tensor_is_clipped_by_its_own_norm(device, order, factor, scale):
    group = {table.CLIP_NORM: 2.0 * abs(factor) / scale, table.GRAD_FACTOR: factor}
    tables = clipping_tables(device, [[3.0, 4.0], [], [0.5], [0.0, 0.0], [8.0]], group)
    tables.grad_scale.fill_(scale)
    tables.reduce(L2)
    tables.advance(norm=order, clip_each=True)
    expected = [share * factor / scale for share in (0.4, 1, 1, 1, 0.25)]
    assert tables.column(table.GRAD_SCALE) == pytest.approx(expected, rel=1e-15, abs=0)


def test_a_tensor_of_many_partial_norms_is_clipped_by_all_of_them(device):
    tables = clipping_tables(device, [[1.0]] * 20, {table.CLIP_NORM: 1.0})
    tables.partials = torch.ones(700, dtype=torch.float64, device=device)
    tables.tensors[5, table.FIRST_PARTIAL.value] = 100
    tables.tensors[5, table.END_PARTIAL.value] = 676
    tables.advance(clip_each=True)
    factors = tables.column(table.GRAD_SCALE)
    assert factors[5] == pytest.approx(1 / 24, rel=1e-15, abs=0)
    assert factors[:5] + factors[6:] == [1.0] * 19


def test_the_norm_of_all_gradients_is_that_of_all_their_partial_norms(device):
    tables = clipping_tables(device, [[1.0]] * 20, {table.MAX_GRAD_NORM: 1.0})
    tables.partials = torch.ones(2500, dtype=torch.float64, device=device)
    tables.counts[table.N_PARTIALS.value] = 2500
    tables.advance(norm=L2)
    assert tables.status[table.GRAD_NORM.value] == 50


@pytest.mark.parametrize("bad", [INFINITY, NAN])
@pytest.mark.parametrize("order", [L2, INF])
def test_a_group_may_skip_steps_whose_norm_is_not_finite(device, bad, order):
    tables = clipping_tables(device, [[1.0], [bad]], {table.SKIP_NONFINITE: 1.0, table.MAX_GRAD_NORM: 1.0})
    tables.reduce(order)
    tables.advance(norm=order)
    assert tables.status[table.N_SKIPPED.value] == 1
    assert tables.status[table.GRAD_NORM.value] == pytest.approx(bad, nan_ok=True)
    assert not any(tables.column(table.ACTIVE))
    assert [row.step.item() for row in tables.rows] == [0, 0]


def test_a_norm_that_is_not_finite_clips_as_torch_does_where_no_skip_is_asked_for(device):
    for bad, factor in ((INFINITY, 0.0), (NAN, NAN)):
        tables = clipping_tables(device, [[1.0], [bad]], {table.MAX_GRAD_NORM: 1.0})
        tables.reduce(L2)
        tables.advance(norm=L2)
        assert all(tables.column(table.ACTIVE))
        assert tables.column(table.GRAD_SCALE) == pytest.approx([factor] * 2, nan_ok=True)
        assert [row.step.item() for row in tables.rows] == [1, 1]
