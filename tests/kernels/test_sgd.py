import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.kernels import table

from .exact import SGDSettings, sgd
from .tables import Row, Tables, place, spec_of


def group_of(s: SGDSettings) -> dict[object, float]:
    return {
        table.LR: s.lr,
        table.MOMENTUM: s.momentum,
        table.DAMPENING: s.dampening,
        table.NESTEROV: float(s.nesterov),
        table.WEIGHT_DECAY: s.weight_decay,
        table.GRAD_FACTOR: s.factor,
    }


def make_row(dtype: torch.dtype, seed: int, has_buffer: bool, settings: SGDSettings, device: torch.device) -> Row:
    values = torch.randn(3, 37, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    param, grad, buffer = (place(t.to(device, dtype), seed % 2) for t in values)
    if not settings.steps_before:
        buffer.zero_()
    step = torch.tensor(float(settings.steps_before), device=device)
    return Row(param, grad, (buffer,) if has_buffer else (), step=step)


def check_step(row: Row, settings: SGDSettings) -> None:
    expected = sgd(row.param, row.grad, row.states, settings)
    tables = Tables([row], [group_of(settings)], device=row.param.device)
    tables.advance("sgd")
    tables.update(spec_of("sgd", row))
    pairs = zip(expected, (row.param, *row.states), strict=True)
    for name, (right, actual) in zip(("param", "buffer"), pairs, strict=False):
        right.check(actual, name)


@given(
    settings=st.builds(
        SGDSettings,
        lr=st.sampled_from([1e-3, 0.1, 1.0]),
        momentum=st.sampled_from([0.5, 0.9, 0.99]),
        dampening=st.sampled_from([0.0, 0.1, 0.9]),
        nesterov=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
        factor=st.sampled_from([1.0, -1.0, 0.37]),
        steps_before=st.sampled_from([0, 1, 100]),
    ),
    has_buffer=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_step_is_that_of_torch(device, settings, has_buffer, dtype, seed):
    check_step(make_row(dtype, seed, has_buffer, settings, device), settings)


def test_the_first_gradient_enters_the_buffer_undamped(device):
    settings = SGDSettings(momentum=0.9, dampening=0.5)
    row = make_row(torch.float32, 0, True, settings, device)
    check_step(row, settings)
    assert torch.equal(row.states[0], row.grad)


def test_without_momentum_no_counter_is_needed(device):
    row = Row(place(torch.ones(5, device=device)), place(torch.ones(5, device=device)))
    tables = Tables([row], [group_of(SGDSettings(lr=0.5))], device=device)
    tables.advance("sgd")
    tables.update(spec_of("sgd", row))
    assert row.param.tolist() == [0.5] * 5


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_nan_gradient_reaches_the_parameter_and_the_buffer(device, nesterov):
    settings = SGDSettings(momentum=0.9, nesterov=nesterov)
    row = make_row(torch.float32, 0, True, settings, device)
    row.grad[3] = float("nan")
    tables = Tables([row], [group_of(settings)], device=device)
    tables.advance("sgd")
    tables.update(spec_of("sgd", row))
    for tensor in (row.param, *row.states):
        assert tensor.isnan().nonzero().tolist() == [[3]]
