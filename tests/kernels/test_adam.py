import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.kernels import table

from .exact import AdamSettings, adam
from .tables import Row, Tables, name_of, place, spec_of

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Parameter, gradient, state.
WHOLE = [(FP32,) * 3, (FP64,) * 3, (BF16,) * 3]
MIXED = [(FP16,) * 3, (BF16, BF16, FP32), (BF16, FP32, FP32), (FP16, FP16, FP32)]


def group_of(s: AdamSettings) -> dict[object, float]:
    return {
        table.LR: s.lr,
        table.BETA1: s.beta1,
        table.BETA2: s.beta2,
        table.EPS: s.eps,
        table.EPSILON_HAT: float(s.epsilon_hat),
        table.WEIGHT_DECAY: s.weight_decay,
        table.DECOUPLED: float(s.decoupled),
        table.GRAD_FACTOR: s.factor,
    }


def make_row(
    dtypes: tuple[torch.dtype, ...],
    *,
    n_states: int = 2,
    numel: int = 37,
    seed: int = 0,
    binade: int = 0,
    offset: int = 0,
    steps_before: int = 0,
    device: torch.device,
) -> Row:
    generator = torch.Generator().manual_seed(seed)
    param, grad, exp_avg, *squares = torch.randn(3 + n_states - 1, numel, generator=generator, dtype=FP64)
    grad, exp_avg = grad * 2.0**binade, exp_avg * 2.0**binade
    squares = [square**2 * 4.0**binade for square in squares]
    tensors = [
        place(values.to(device, dtype), offset)
        for values, dtype in zip([param, grad, exp_avg, *squares], [*dtypes[:2], *dtypes[2:] * 3], strict=False)
    ]
    return Row(*tensors[:2], tuple(tensors[2:]), step=torch.tensor(float(steps_before), device=device))


def check_step(row: Row, settings: AdamSettings) -> None:
    """Take a step and hold it against float64."""
    tensors = (row.param, row.grad, row.states)
    expected = adam(*tensors, settings)
    tables = Tables([row], [group_of(settings)], device=row.param.device)
    tables.advance()
    tables.update(spec_of("adam", row))
    assert row.step.item() == settings.steps_before + 1
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    pairs = zip(expected, (row.param, *row.states), strict=True)
    for name, (right, actual) in zip(names, pairs, strict=False):
        right.check(actual, name)


SETTINGS = st.builds(
    AdamSettings,
    lr=st.sampled_from([1e-3, 0.1, 1.0]),
    beta1=st.sampled_from([0.0, 0.9, 0.95]),
    beta2=st.sampled_from([0.5, 0.95, 0.999, 0.9999]),
    eps=st.sampled_from([1e-8, 1e-3, 1.0]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    decoupled=st.booleans(),
    epsilon_hat=st.booleans(),
    factor=st.sampled_from([1.0, -1.0, 0.37]),
    steps_before=st.sampled_from([0, 1, 9, 9999]),
)


@given(
    settings=SETTINGS,
    dtypes=st.sampled_from(WHOLE),
    n_states=st.sampled_from([2, 3]),
    seed=st.integers(0, 1000),
    binade=st.integers(-20, 20),
    offset=st.sampled_from([0, 1]),
)
def test_a_step_is_that_of_the_paper(device, settings, dtypes, n_states, seed, binade, offset):
    row = make_row(
        dtypes,
        n_states=n_states,
        seed=seed,
        binade=binade,
        offset=offset,
        steps_before=settings.steps_before,
        device=device,
    )
    check_step(row, settings)


@pytest.mark.parametrize("n_states", [2, 3])
@pytest.mark.parametrize("dtypes", WHOLE + MIXED, ids=lambda dtypes: "-".join(map(name_of, dtypes)))
def test_every_combination_of_dtypes_takes_a_right_step(device, dtypes, n_states):
    settings = AdamSettings(weight_decay=0.1, epsilon_hat=False, steps_before=4)
    check_step(make_row(dtypes, n_states=n_states, steps_before=4, device=device), settings)


def test_one_launch_serves_groups_of_different_hyperparameters_and_counts(device):
    all_settings = [
        AdamSettings(lr=0.1),
        AdamSettings(lr=0.01, beta1=0.0, epsilon_hat=False, steps_before=3),
        AdamSettings(beta2=0.5, weight_decay=0.1, decoupled=True, factor=-1.0, steps_before=1000),
    ]
    rows = [
        make_row((FP32,) * 3, seed=i, numel=5 + 150 * i, steps_before=settings.steps_before, device=device)
        for i, settings in enumerate(all_settings)
    ]
    rows = [dataclasses.replace(row, group=i) for i, row in enumerate(rows)]
    expected = [adam(row.param, row.grad, row.states, s) for row, s in zip(rows, all_settings, strict=True)]
    tables = Tables(rows[::-1], [group_of(settings) for settings in all_settings], device=device)
    tables.advance()
    tables.update(spec_of("adam", rows[0]))
    for row, right in zip(rows, expected, strict=True):
        for one, actual in zip(right, (row.param, *row.states), strict=True):
            one.check(actual, f"group {row.group}")


def test_a_gradient_of_zero_from_the_start_moves_nothing_but_the_count(device):
    zero = torch.zeros(20, device=device)
    row = Row(place(torch.ones(20, device=device)), place(zero), (place(zero), place(zero)), step=zero[0])
    before = row.param.clone()
    tables = Tables([row], [group_of(AdamSettings())], device=device)
    tables.advance()
    tables.update(spec_of("adam", row))
    assert torch.equal(row.param, before)
    assert row.step == 1


@pytest.mark.parametrize("n_states", [2, 3])
def test_a_nan_gradient_reaches_the_parameter_and_every_state(device, n_states):
    row = make_row((FP32,) * 3, n_states=n_states, device=device)
    row.grad[3] = float("nan")
    tables = Tables([row], [group_of(AdamSettings())], device=device)
    tables.advance()
    tables.update(spec_of("adam", row))
    for tensor in (row.param, *row.states):
        assert tensor.isnan().nonzero().tolist() == [[3]]


def test_the_largest_second_moment_is_kept(device):
    row = make_row((FP32,) * 3, n_states=3, device=device)
    row.states[2].fill_(100.0)
    row.grad[0] = 1e4
    tables = Tables([row], [group_of(AdamSettings())], device=device)
    tables.advance()
    tables.update(spec_of("adam", row))
    assert row.states[2][0] == row.states[1][0] > 100
    assert (row.states[2][1:] == 100).all()


@pytest.mark.gpu  # the interpreter truncates fp32 to bf16
def test_bf16_is_rounded_to_nearest(device):
    low, full = (make_row(dtypes, numel=1000, device=device) for dtypes in ((BF16,) * 3, (FP32,) * 3))
    for to, source in zip((full.param, full.grad, *full.states), (low.param, low.grad, *low.states), strict=True):
        to.copy_(source)
    for row in (low, full):
        tables = Tables([row], [group_of(AdamSettings(lr=0.1))], device=device)
        tables.advance()
        tables.update(spec_of("adam", row))
    for rounded, exact in zip((low.param, *low.states), (full.param, *full.states), strict=True):
        assert torch.equal(rounded, exact.bfloat16())
