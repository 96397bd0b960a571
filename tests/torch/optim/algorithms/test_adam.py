import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import bias_correction
from dragon.vm.torch.optim._algorithms.adam import adam_update, one_minus_power
from dragon.vm.torch.optim._algorithms.algorithm import Maths

betas = st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True)
steps = st.sampled_from([1, 2, 10, 1000, 2**24]) | st.integers(1, 10**6)


@given(betas, steps)
def test_a_bias_correction_has_no_cancellation(beta, step):
    expected = bias_correction(beta, step)
    # The exponent of a rounded logarithm may be off by its own rounding.
    size = min(step * -math.log(beta), 1.0) if beta > 0 else 0.0
    assert abs(one_minus_power(beta, step) - expected) <= 2 * np.finfo(float).eps * (expected + size)


@given(st.floats(0, 10), betas, betas, st.sampled_from([0.0, 1e-8, 1.0]), steps, st.booleans())
def test_both_forms_of_epsilon_fold_into_one_update(lr, beta1, beta2, eps, step, epsilon_hat):
    group = {
        **{"lr": lr, "betas": (beta1, beta2), "eps": eps, "epsilon_hat": epsilon_hat},
        **{"weight_decay": 0.0, "decoupled_weight_decay": False, "amsgrad": False},
    }
    param, grad, *states = (torch.tensor(value, dtype=torch.float64) for value in (0.0, 0.4, 0.3, 0.7))
    updated, (exp_avg, exp_avg_sq) = adam_update(
        param, grad, states, torch.tensor(float(step)), group, Maths(torch.sqrt, False)
    )
    corrected1, corrected2 = one_minus_power(beta1, step), one_minus_power(beta2, step)
    if epsilon_hat:
        expected = lr * math.sqrt(corrected2) / corrected1 * exp_avg / (math.sqrt(exp_avg_sq) + eps)
    else:
        expected = lr * (exp_avg / corrected1) / (math.sqrt(exp_avg_sq / corrected2) + eps)
    # A product of a learning rate near the smallest number is rounded to a subnormal one, here or there.
    assert float(-updated) == pytest.approx(float(expected), rel=1e-14, abs=1e-300)
