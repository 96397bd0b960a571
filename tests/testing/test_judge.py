import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dragon.vm.testing import (
    AdamOptions,
    AdamState,
    Budget,
    GradientCase,
    GroupCase,
    OptimizerCase,
    ParityError,
    SGDOptions,
    SGDState,
    StepCase,
    TensorCase,
    adam_errors,
    adam_reference,
    adam_units,
    assert_adam_step,
    assert_within_budget,
    check_adam,
    default_compute_dtype,
    errors_in_units,
    fused_adam_step,
    sgd_errors,
)
from dragon.vm.testing.measure import main, measure

EPS = 2.0**-23
inf, nan = math.inf, math.nan


def one_error(got, expected, unit=1.0, dtype=torch.float32):
    wide = np.asarray([expected], np.longdouble)
    return float(errors_in_units(torch.tensor([got], dtype=dtype), wide, np.asarray([unit], np.longdouble))[0])


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        (5.0, 3.0, 2.0),
        (inf, inf, 0.0),
        (nan, nan, 0.0),
        (nan, 1.0, inf),
        (1.0, nan, inf),
        (1.0, inf, inf),
        (-inf, inf, inf),
        (inf, -inf, inf),
        (nan, inf, inf),
        (inf, nan, inf),
        (inf, 1e300, 0.0),  # rounds to infinity
        (-inf, -1e300, 0.0),
    ],
)
def test_errors_count_units_and_classes_must_match(got, expected, error):
    assert one_error(got, expected) == error


def test_an_overflow_is_as_wrong_as_its_distance_from_the_border():
    border = 65504 + 16  # where float16 begins to round to infinity
    assert one_error(inf, border - 40, unit=20.0, dtype=torch.float16) == 2
    assert one_error(inf, -border, unit=20.0, dtype=torch.float16) > 1000


def test_an_infinite_unit_allows_everything():
    assert [one_error(got, 1.0, unit=inf) for got in (7.0, inf, nan)] == [0, 0, 0]


def start_of(param, exp_avg, exp_avg_sq, step=9.0, dtype=torch.float32):
    tensors = [torch.tensor([value], dtype=dtype) for value in (param, exp_avg, exp_avg_sq)]
    return AdamState(tensors[0], step, tensors[1], tensors[2], None)


def units(start, grad, **options):
    given_options = AdamOptions(**options)
    grad = torch.tensor([grad], dtype=start.param.dtype)
    expected = adam_reference(start, grad, given_options)
    compute_dtype = default_compute_dtype(start.param.dtype)
    return adam_units(start, grad, expected, given_options, compute_dtype)


def test_the_unit_is_eps_of_the_largest_addend_however_much_cancels():
    found = units(start_of(0.0, 1.0, 1.0), grad=-1.0, betas=(0.5, 0.75))
    assert float(found.exp_avg[0]) == pytest.approx(EPS * 0.5, rel=1e-6, abs=0)
    assert float(found.exp_avg_sq[0]) == pytest.approx(EPS * 0.75, rel=1e-6, abs=0)


def test_a_maximum_is_no_addend_of_the_second_moment():
    start = start_of(1.0, 1.0, 1.0)._replace(max_exp_avg_sq=torch.full((1,), 1e12))
    found = units(start, grad=1.0, amsgrad=True, betas=(0.9, 0.75))
    assert float(found.exp_avg_sq[0]) == pytest.approx(EPS * 0.75, rel=1e-6, abs=0)
    assert float(found.max_exp_avg_sq[0]) == pytest.approx(EPS * 1e12, rel=1e-6, abs=0)
    options = AdamOptions(amsgrad=True)
    after = fused_adam_step(start, torch.ones(1), options, torch.float32)
    assert_adam_step(start, torch.ones(1), after, options)
    for wrong in (0.0, -50.0, 1000.0):
        with pytest.raises(ParityError, match=rf"exp_avg_sq\[0\] .* is {wrong}, expected 1\.0"):
            assert_adam_step(start, torch.ones(1), after._replace(exp_avg_sq=torch.full((1,), wrong)), options)


def test_decay_that_cancels_the_gradient_counts_with_its_operands():
    found = units(start_of(1.0, 0.0, 0.0), grad=-1.0, betas=(0.5, 0.5), weight_decay=1.0)
    assert float(found.exp_avg[0]) == pytest.approx(EPS * 0.5, rel=1e-6, abs=0)
    assert float(found.exp_avg_sq[0]) == pytest.approx(EPS * 0.5, rel=1e-6, abs=0)


def test_the_unit_of_a_parameter_of_large_size_is_its_own_eps():
    found = units(start_of(1000.0, 1.0, 1.0), grad=1.0)
    assert float(found.param[0]) == pytest.approx(EPS * 1000, rel=1e-3, abs=0)


def test_zeros_are_judged_by_the_smallest_subnormal():
    found = units(start_of(0.0, 0.0, 0.0), grad=0.0)
    assert float(found.exp_avg[0]) == pytest.approx(2.0**-149, rel=1e-6, abs=0)
    assert float(found.exp_avg_sq[0]) == pytest.approx(2.0**-149, rel=1e-6, abs=0)


def test_an_underflowed_second_moment_without_eps_allows_any_parameter():
    assert float(units(start_of(1.0, 0.0, 0.0), grad=1e-30, eps=0.0).param[0]) == inf
    # Divided by 0 also here, and by other numbers one unit away.
    assert float(units(start_of(1.0, 1.0, 0.0), grad=0.0, eps=0.0).param[0]) == inf


def test_a_product_of_lr_that_is_subnormal_may_be_divided_by_a_small_root():
    found = units(start_of(0.0, 1e-12, 1e-24), grad=0.0, lr=1e-30, eps=0.0)
    assert float(found.param[0]) == pytest.approx(2.0**-149 / 1e-12, rel=1e-3, abs=0)


def test_a_bias_correction_has_the_error_of_what_it_is_the_difference_of():
    start = start_of(0.0, 1.0, 1.0, step=0.0, dtype=torch.float64)
    found = units(start, grad=1.0, lr=1.0, betas=(0.0, 1 - 2.0**-20))
    # By the correction's root: 2^20 units of it are 2^-32 of a change of 2^-10.
    assert float(found.param[0]) == pytest.approx(2.0**-42, rel=1e-3, abs=0)


def test_zeros_over_zeros_are_nan_in_every_precision():
    start, grad, options = start_of(1.0, 0.0, 0.0), torch.zeros(1), AdamOptions(eps=0.0)
    after = fused_adam_step(start, grad, options, torch.float32)
    assert after.param.isnan().all()
    assert_adam_step(start, grad, after, options)
    with pytest.raises(ParityError, match="expected nan"):
        assert_adam_step(start, grad, after._replace(param=start.param), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_judged_also_where_torch_has_none(dtype):
    start, grad = start_of(1.0, 3e38, 0.0, dtype=dtype), torch.tensor([-3e38], dtype=dtype)
    after = fused_adam_step(start, grad, AdamOptions(), torch.float32)
    # By infinities over infinities: differences and squares do not fit.
    assert after.param.isnan().all()
    assert_adam_step(start, grad, after, AdamOptions())
    right = torch.tensor(adam_reference(start, grad, AdamOptions()).param.astype(float)).to(dtype)
    assert_adam_step(start, grad, after._replace(param=right), AdamOptions())
    with pytest.raises(ParityError, match=r"param.* is 5\.0, expected"):
        assert_adam_step(start, grad, after._replace(param=torch.full_like(right, 5.0)), AdamOptions())


def test_a_gradient_of_nan_must_reach_everything():
    start, grad = start_of(1.0, 1.0, 1.0), torch.tensor([nan])
    after = fused_adam_step(start, grad, AdamOptions(), torch.float32)
    assert_adam_step(start, grad, after, AdamOptions())
    for field in ("param", "exp_avg", "exp_avg_sq"):
        with pytest.raises(ParityError, match=f"{field}.* expected nan"):
            assert_adam_step(start, grad, after._replace(**{field: torch.ones(1)}), AdamOptions())


def test_a_parameter_that_is_already_infinite_stays_so():
    start, grad = start_of(inf, 1.0, 1.0), torch.ones(1)
    after = fused_adam_step(start, grad, AdamOptions(), torch.float32)
    assert_adam_step(start, grad, after, AdamOptions())
    with pytest.raises(ParityError, match="expected inf"):
        assert_adam_step(start, grad, after._replace(param=torch.ones(1)), AdamOptions())


def test_sixteen_bit_parameters_have_units_of_their_storage():
    found = units(start_of(1.0, 0.0, 0.0, dtype=torch.bfloat16), grad=1.0)
    assert float(found.param[0]) == pytest.approx(2.0**-7, rel=0.01)
    assert float(found.exp_avg[0]) == pytest.approx(2.0**-7 * 0.1, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("field", ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_storage_of_sixteen_bits_must_round_to_nearest(field, dtype):
    generator = torch.Generator().manual_seed(0)
    param, grad, m, v = (torch.randn(64, generator=generator).to(dtype) for _ in range(4))
    start, options = AdamState(param, 9.0, m, v.square(), v.square() / 2), AdamOptions(amsgrad=True, lr=0.1)
    after = fused_adam_step(start, grad, options, torch.float32)
    assert_adam_step(start, grad, after, options)
    exact = torch.from_numpy(getattr(adam_reference(start, grad, options), field).astype("float64"))
    nearest = getattr(after, field)
    toward_zero = torch.where(
        nearest.double().abs() > exact.abs(), (nearest.view(torch.int16) - 1).view(dtype), nearest
    )
    cut = after._replace(**{field: toward_zero})
    with pytest.raises(ParityError, match=rf"^parameter: {field}\["):
        assert_adam_step(start, grad, cut, options)
    two_eps = Budget(**{field: 2.0**16 if dtype == torch.bfloat16 else 2.0**13})
    assert_adam_step(start, grad, cut, options, budget=two_eps)


def test_float32_arithmetic_may_fall_on_either_side_of_a_tie_of_the_storage():
    options = SGDOptions(lr=1.0)
    # 1 + 2**-8 is a tie of bfloat16; the error of one rounding of the arithmetic decides.
    start, grad = SGDState(torch.ones(1, dtype=torch.bfloat16), None), torch.tensor([-(2.0**-8) * (1 + 2.0**-16)])
    for got in (1.0, 1.0 + 2.0**-7):
        after = SGDState(torch.tensor([got], dtype=torch.bfloat16), None)
        assert_within_budget(sgd_errors(start, grad, after, options))


def test_arithmetic_of_sixteen_bits_is_not_taken_for_float32():
    case = OptimizerCase(
        {"lr": 0.1, "weight_decay": 0.5},
        (GroupCase((TensorCase(seed=1, binade=0, numel=64, dtype=torch.bfloat16),), {}),),
        (StepCase((GradientCase(seed=2, binade=0),), {}),),
    )

    def for_loop(groups, **options):
        return torch.optim.Adam(groups, foreach=False, **options)

    check_adam(for_loop, case, compute_dtype=torch.bfloat16)
    with pytest.raises(ParityError):
        check_adam(for_loop, case)


def test_the_message_names_tensor_field_index_values_error_and_budget():
    start = AdamState(torch.ones(2, 3), 4.0, torch.zeros(2, 3), torch.zeros(2, 3), None)
    grad, options = torch.ones(2, 3), AdamOptions()
    after = fused_adam_step(start, grad, options, torch.float32)
    after.exp_avg[1, 2] += 1e-4
    with pytest.raises(ParityError) as caught:
        assert_adam_step(start, grad, after, options, where="layer.weight")
    message = str(caught.value)
    assert message.startswith("layer.weight: exp_avg[1, 2] of shape [2, 3] is 0.1001")
    for part in ("expected 0.0999999", "eps of its largest addend", "torch fused", "slack 3", "1 of 6 elements"):
        assert part in message


def test_a_wider_budget_lets_a_wider_error_pass():
    start, grad = start_of(1.0, 0.0, 0.0), torch.ones(1)
    after = fused_adam_step(start, grad, AdamOptions(), torch.float32)
    after.exp_avg.add_(0.1 * 50 * EPS)
    with pytest.raises(ParityError):
        assert_adam_step(start, grad, after, AdamOptions())
    assert_adam_step(start, grad, after, AdamOptions(), budget=Budget(exp_avg=60))


def test_a_wrong_step_count_is_an_error_of_its_own():
    start, grad = start_of(1.0, 0.0, 0.0), torch.ones(1)
    after = fused_adam_step(start, grad, AdamOptions(), torch.float32)._replace(step=11.0)
    with pytest.raises(ParityError, match="w: step went from 9 to 11, expected 10"):
        assert_adam_step(start, grad, after, AdamOptions(), where="w")


def test_a_state_of_another_shape_is_an_error_of_its_own():
    start, grad = start_of(1.0, 0.0, 0.0), torch.ones(1)
    after = fused_adam_step(start, grad, AdamOptions(), torch.float32)
    with pytest.raises(ParityError, match=r"exp_avg has shape \(1, 1\), its parameter has \(1,\)"):
        adam_errors(start, grad, after._replace(exp_avg=after.exp_avg[None]), AdamOptions())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.25, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_torchs_own_step_is_within_two_units(seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    param, grad, m, v = (torch.randn(17, generator=generator).mul_(scale).to(dtype) for _ in range(4))
    start, options = AdamState(param, 3.0, m, v.square(), None), AdamOptions()
    after = fused_adam_step(start, grad, options, torch.float32)
    for errors in adam_errors(start, grad, after, options):
        assert errors.worst() <= 2, errors.field


def test_the_measurement_stays_within_the_default_budget():
    table = measure(steps=8)
    assert {(dtype, name) for dtype, name, _ in table} >= {("float32", "fused"), ("bfloat16", "for-loop")}
    for (dtype, _, field), (_, excess) in table.items():
        # float16 arithmetic has no 1e-8: that torch's for-loop divides by zero there is its own defect.
        if dtype != "float16":
            assert excess <= getattr(Budget(), field)


def test_a_measurement_of_no_steps_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["measure", "--steps", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
