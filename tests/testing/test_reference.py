import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import (
    AdamOptions,
    AdamState,
    SGDOptions,
    SGDState,
    adam_reference,
    bias_correction,
    fused_adam_step,
    hyperparameters,
    sgd_reference,
)

OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
EXTENDED = np.finfo(np.longdouble).eps < 1e-18
values = st.floats(-10, 10, allow_subnormal=False)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def state(param, step, exp_avg, exp_avg_sq, maximum):
    return AdamState(scalar(param), step, scalar(exp_avg), scalar(exp_avg_sq), scalar(maximum))


def decimal_adam(start, grad, o):
    """Adam as the paper has it, one number at 60 digits; returns parameter, moments, and maximum."""
    d = Decimal
    param, g = d(start.param.item()), d(grad) * (-1 if o.maximize else 1)
    beta1, beta2, t = d(o.betas[0]), d(o.betas[1]), int(start.step) + 1
    if o.decoupled_weight_decay:
        param -= d(o.lr) * d(o.weight_decay) * param
    else:
        g += d(o.weight_decay) * param
    m = beta1 * d(start.exp_avg.item()) + (1 - beta1) * g
    v = beta2 * d(start.exp_avg_sq.item()) + (1 - beta2) * g * g
    top = max(v, d(start.max_exp_avg_sq.item())) if o.amsgrad else v
    if o.epsilon_hat:
        rate = d(o.lr) * (1 - beta2**t).sqrt() / (1 - beta1**t)
        return param - rate * m / (top.sqrt() + d(o.eps)), m, v, top
    m_hat, v_hat = m / (1 - beta1**t), top / (1 - beta2**t)
    return param - d(o.lr) * m_hat / (v_hat.sqrt() + d(o.eps)), m, v, top


@pytest.mark.skipif(not EXTENDED, reason="longdouble is no wider than float64 on this platform")
@given(
    hyperparameters(OPTIONS),
    st.booleans(),
    st.sampled_from([0, 1, 9, 999, 100_000]),
    values,
    values,
    values,
    st.floats(1e-6, 10),
    values,
)
def test_it_is_the_papers_formula_to_60_digits_rounded(kwargs, hat, step, param, grad, m, v, top):
    options = AdamOptions(**{**kwargs, "epsilon_hat": hat, "eps": kwargs.get("eps", 1e-8) or 1e-8})
    start = state(param, step, m, v, abs(top))
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 60, -(10**6), 10**6
        exact = decimal_adam(start, grad, options)
    got = adam_reference(start, scalar(grad), options)
    largest = 1 + abs(param) + abs(grad) + abs(float(exact[0]))
    assert abs(float(got.param) - float(exact[0])) <= 1e-15 * largest
    for wide, digits in zip((got.exp_avg, got.exp_avg_sq, got.max_exp_avg_sq), exact[1:], strict=True):
        if wide is not None:
            error = Decimal(str(np.format_float_scientific(wide, precision=30))) - digits
            assert abs(error) <= Decimal("1e-18") * (1 + abs(digits) + Decimal(400))
    assert got.step == step + 1


@given(st.floats(0.5, 1 - 1e-9) | st.sampled_from([0.999, 0.9999]), st.integers(1, 10**6))
def test_bias_corrections_do_not_cancel(beta, step):
    with localcontext() as context:
        context.prec = 60
        exact = 1 - Decimal(beta) ** step
    assert math.isclose(bias_correction(beta, step), float(exact), rel_tol=1e-15)


@pytest.mark.parametrize("step", [1, 5])
def test_a_beta_of_zero_needs_no_correction(step):
    assert bias_correction(0.0, step) == 1


@given(hyperparameters(("lr", "betas", "weight_decay", "maximize")), values, st.integers(0, 1000))
def test_the_two_forms_of_epsilon_are_one_formula(kwargs, grad, step):
    start = state(1.0, step, 0.5, 0.25, 0.0)
    betas = kwargs.get("betas", (0.9, 0.999))
    paper = adam_reference(start, scalar(grad), AdamOptions(**kwargs, eps=1e-3))
    eps_hat = 1e-3 * math.sqrt(bias_correction(betas[1], step + 1))
    hat = adam_reference(start, scalar(grad), AdamOptions(**kwargs, eps=eps_hat, epsilon_hat=True))
    np.testing.assert_allclose(float(hat.param), float(paper.param), rtol=0, atol=1e-14 * (1 + abs(paper.param)))


def test_an_expected_value_worked_out_by_hand():
    start = state(1.0, 0, 0.0, 0.0, 0.0)
    options = AdamOptions(lr=0.5, betas=(0.5, 0.75), eps=1.0)
    # m = 2, v = 4, corrections 1/2 and 1/4: 1 - 0.5 * 4 / (4 + 1), and with epsilon-hat 1 - 0.5 * 2 / (2 + 1).
    step = adam_reference(start, scalar(4.0), options)
    hat = adam_reference(start, scalar(4.0), AdamOptions(lr=0.5, betas=(0.5, 0.75), eps=1.0, epsilon_hat=True))
    assert (float(step.exp_avg), float(step.exp_avg_sq)) == (2, 4)
    assert float(step.param) == 1 - 0.5 * 4 / 5
    assert float(hat.param) == 2 / 3


def test_gradients_are_scaled_then_clipped():
    start, options = state(0.0, 0, 0.0, 0.0, 0.0), AdamOptions(betas=(0.5, 0.5), grad_scale=0.5, clip_value=3.0)
    for given_grad, used in ((4.0, 2.0), (100.0, 3.0), (-100.0, -3.0)):
        assert adam_reference(start, scalar(given_grad), options).exp_avg == used / 2


def test_amsgrad_without_its_maximum_is_refused():
    start = state(0.0, 0, 0.0, 0.0, 0.0)._replace(max_exp_avg_sq=None)
    with pytest.raises(ValueError, match=r"needs start\.max_exp_avg_sq"):
        adam_reference(start, scalar(1.0), AdamOptions(amsgrad=True))


@given(hyperparameters(OPTIONS), st.booleans(), values)
def test_the_fused_step_is_the_same_step_in_float64(kwargs, hat, grad):
    options = AdamOptions(**{**kwargs, "epsilon_hat": hat, "eps": 1e-8})
    start = state(0.5, 3, 0.5, 0.25, 0.125)
    fused = fused_adam_step(start, scalar(grad), options, torch.float64)
    expected = adam_reference(start, scalar(grad), options)
    assert fused.param.item() == pytest.approx(float(expected.param), rel=1e-9, abs=1e-9)
    assert fused.exp_avg_sq.item() == pytest.approx(float(expected.exp_avg_sq), rel=1e-12, abs=0)


def test_the_start_is_left_alone():
    start = state(0.5, 3, 0.5, 0.25, 0.125)
    fused_adam_step(start, scalar(2.0), AdamOptions(amsgrad=True, maximize=True), torch.float64)
    assert [float(x) for x in start] == [0.5, 3, 0.5, 0.25, 0.125]


def test_sgd_fills_its_buffer_undamped_first():
    options = SGDOptions(lr=1.0, momentum=0.5, dampening=0.75, weight_decay=0.5)
    first = sgd_reference(SGDState(scalar(2.0), None), scalar(3.0), options)
    assert (first.momentum_buffer, first.param) == (4, -2)
    second = sgd_reference(SGDState(scalar(2.0), scalar(4.0)), scalar(3.0), options)
    assert (second.momentum_buffer, second.param) == (3, -1)


def test_nesterov_looks_ahead():
    options = SGDOptions(lr=1.0, momentum=0.5, nesterov=True, maximize=True)
    step = sgd_reference(SGDState(scalar(0.0), scalar(2.0)), scalar(3.0), options)
    assert (step.momentum_buffer, step.param) == (-2, 4)


@pytest.mark.skipif(not EXTENDED, reason="longdouble is no wider than float64 on this platform")
def test_what_dampening_leaves_is_not_rounded_to_float64():
    start = SGDState(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    grad, options = torch.ones(1, dtype=torch.float64), SGDOptions(momentum=0.9, dampening=0.1)
    found = sgd_reference(start, grad, options).momentum_buffer
    assert Fraction(*found[0].as_integer_ratio()) == 1 - Fraction(0.1) != Fraction(1 - 0.1)
