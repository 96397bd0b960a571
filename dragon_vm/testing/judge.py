"""Judge a step from its own start: what an optimizer wrote, against the reference applied to what it had.

Tolerances then do not grow with the number of steps, and a second step never inherits the blame for the
first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .budget import DEFAULT_BUDGET, Budget
from .fused import fused_adam_step, fused_sgd_step
from .records import AdamOptions, AdamState, SGDOptions, SGDState, StateT, converted
from .reference import adam_reference, sgd_reference
from .units import adam_units, sgd_units
from .wide import WideArray, wide


class FieldErrors(NamedTuple):
    """Errors of one tensor of a step; every array has the parameter's shape."""

    field: str  # "param", "exp_avg", ...
    got: Tensor  # as the optimizer stored it
    expected: WideArray  # by the reference, unrounded
    unit: WideArray  # one unit of error, in the tensor's own numbers
    error: WideArray  # |got - expected| in units; inf where a finite value is non-finite or the reverse
    fused_error: WideArray  # the same of torch's fused step from the same start
    slack_unit: WideArray  # what one unit of slack allows, in units; see `Budget`

    def worst(self) -> float:
        """Return the largest error in units, 0 for an empty tensor."""
        return float(np.max(self.error, initial=0.0))


class ParityError(AssertionError):
    """A step is further from the reference than its budget allows."""


def default_compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the precision a good optimizer computes in: float32 for 16-bit parameters, else their own."""
    return torch.float32 if param_dtype.itemsize < 4 else param_dtype


@np.errstate(all="ignore")
def errors_in_units(got: Tensor, expected: WideArray, unit: WideArray) -> WideArray:
    """Return |got - expected| / unit elementwise.

    An infinite `got` counts as the value from which `got.dtype` rounds to infinity, so that an overflow is
    as wrong as its distance from that border. NaN is right only where NaN is expected, and a finite value
    where an infinite one is expected is infinitely wrong.
    """
    info = torch.finfo(got.dtype)
    # Half a step of the last binade past the largest number: max / (2 - eps) is that binade.
    border = info.max + np.longdouble(info.max) / (2 - info.eps) * info.eps / 2
    value = wide(got)
    short_of_border = np.sign(value) * expected < border
    seen = np.where(np.isinf(value), np.where(short_of_border, np.sign(value) * border, expected), value)
    error = abs(seen - expected) / unit
    error = np.where(np.isnan(value), np.inf, error)
    same = np.where(np.isnan(expected), np.isnan(value), value == expected)
    error = np.where(np.isfinite(expected), error, np.where(same, 0, np.inf))
    # An infinite unit means that arithmetic of this precision allows every result.
    return np.asarray(np.where(np.isinf(unit), 0, error), np.longdouble)


def _before_storage(state: StateT, compute_dtype: torch.dtype) -> StateT:
    """Return the same numbers in dtypes as fine as the arithmetic's: their units have no rounding of storage."""
    return converted(state, lambda value: value.to(torch.promote_types(value.dtype, compute_dtype)))


def _field_errors(
    field: str, got: Tensor | None, expected: WideArray, unit: WideArray, arithmetic: WideArray, fused: Tensor
) -> FieldErrors:
    if got is None:
        raise ParityError(f"{field} is missing: the optimizer keeps no such state after the step")
    got = got.detach().cpu()
    if got.shape != fused.shape:
        raise ParityError(f"{field} has shape {tuple(got.shape)}, its parameter has {tuple(fused.shape)}")
    expected, unit = np.asarray(expected), np.asarray(unit)
    error, fused_error = errors_in_units(got, expected, unit), errors_in_units(fused, expected, unit)
    # Where torch's own step is not finite, for instance by underflow to 0/0, neither need ours be; but a
    # finite value there gets nothing from torch's being infinitely wrong.
    lost = ~np.isfinite(fused_error)
    excused = lost & ~np.isfinite(wide(got))
    # Twice: beside a tie of the storage torch's error and ours add up.
    with np.errstate(invalid="ignore"):
        is_coarse = ~lost & (2 * arithmetic < unit)
        slack_unit = np.where(is_coarse, 2 * arithmetic / unit, 1)
    error, fused_error = np.where(excused, 0, error), np.where(lost, 0, fused_error)
    return FieldErrors(field, got, expected, unit, error, fused_error, slack_unit)


def _all_errors(
    after: StateT, expected: NamedTuple, units: NamedTuple, arithmetic: NamedTuple, fused: StateT
) -> list[FieldErrors]:
    sources = after, expected, units, arithmetic, fused
    return [
        _field_errors(name, *(getattr(source, name) for source in sources))
        for name in units._fields
        if getattr(expected, name) is not None
    ]


def adam_errors(
    start: AdamState,
    grad: Tensor,
    after: AdamState,
    options: AdamOptions,
    compute_dtype: torch.dtype | None = None,
) -> list[FieldErrors]:
    """Measure one Adam step of one parameter, from its own start.

    Args:
        start: State before the step, as stored.
        grad: Gradient of the step, any strides, any floating dtype.
        after: State after the step, as the optimizer produced it.
        options: Hyperparameters of the step.
        compute_dtype: Precision of the arithmetic, None for `default_compute_dtype`.

    Raises:
        ParityError: The step count is not one more than before, or a state is missing or of the wrong shape.
    """
    if after.step != start.step + 1:
        raise ParityError(f"step went from {start.step:g} to {after.step:g}, expected {start.step + 1:g}")
    compute_dtype = compute_dtype or default_compute_dtype(start.param.dtype)
    expected = adam_reference(start, grad, options)
    units, arithmetic = (
        adam_units(each, grad, expected, options, compute_dtype)
        for each in (start, _before_storage(start, compute_dtype))
    )
    fused = fused_adam_step(start, grad, options, compute_dtype)
    return _all_errors(after, expected, units, arithmetic, fused)


def sgd_errors(
    start: SGDState,
    grad: Tensor,
    after: SGDState,
    options: SGDOptions,
    compute_dtype: torch.dtype | None = None,
) -> list[FieldErrors]:
    """Measure one SGD step of one parameter, from its own start; arguments and errors as in `adam_errors`."""
    compute_dtype = compute_dtype or default_compute_dtype(start.param.dtype)
    expected = sgd_reference(start, grad, options)
    state_dtype = start.param.dtype if after.momentum_buffer is None else after.momentum_buffer.dtype
    fine_dtype = torch.promote_types(state_dtype, compute_dtype)
    units = sgd_units(start, grad, expected, options, state_dtype, compute_dtype)
    fine_start = _before_storage(start, compute_dtype)
    arithmetic = sgd_units(fine_start, grad, expected, options, fine_dtype, compute_dtype)
    fused = fused_sgd_step(start, grad, options, compute_dtype)
    if fused.momentum_buffer is not None:
        fused = fused._replace(momentum_buffer=fused.momentum_buffer.to(state_dtype))
    return _all_errors(after, expected, units, arithmetic, fused)


def assert_within_budget(
    fields: list[FieldErrors], budget: Budget = DEFAULT_BUDGET, where: str = "parameter"
) -> None:
    """Assert that every element is at most as wrong as torch's fused step plus the slack of its field.

    Raises:
        ParityError: Names the tensor, field and index, what was got and expected, the error in units and the
            budget.
    """
    for errors in fields:
        slack = getattr(budget, errors.field) * errors.slack_unit
        allowed = errors.fused_error + slack
        # Written as "not <=" so that a NaN is no pass.
        bad = ~(errors.error <= allowed)
        if not bad.any():
            continue
        excess = np.where(bad, np.nan_to_num(errors.error, nan=np.inf), -1)
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
        raise ParityError(
            f"{where}: {errors.field}[{', '.join(map(str, index))}] of shape {list(excess.shape)} is "
            f"{errors.got[index].item()!r}, expected {float(errors.expected[index])!r}: off by "
            f"{float(errors.error[index]):.4g} eps of its largest addend "
            f"(one is {float(errors.unit[index]):.4g}), allowed {float(allowed[index]):.4g} "
            f"(torch fused {float(errors.fused_error[index]):.4g} + slack {float(slack[index]):.4g}); "
            f"{int(bad.sum())} of {bad.size} elements are out of budget"
        )


def assert_adam_step(
    start: AdamState,
    grad: Tensor,
    after: AdamState,
    options: AdamOptions,
    *,
    budget: Budget = DEFAULT_BUDGET,
    compute_dtype: torch.dtype | None = None,
    where: str = "parameter",
) -> None:
    """Assert that one Adam step of one parameter is right, judged from its own start.

    Args:
        start: State before the step, as stored.
        grad: Gradient of the step.
        after: State after the step, as the optimizer produced it.
        options: Hyperparameters of the step.
        budget: Slack by field.
        compute_dtype: Precision of the arithmetic, None for `default_compute_dtype`.
        where: What to call the parameter in the message.

    Raises:
        ParityError: Says which tensor, field and element, by how much, and what was allowed.
    """
    try:
        fields = adam_errors(start, grad, after, options, compute_dtype)
    except ParityError as error:
        raise ParityError(f"{where}: {error}") from None
    assert_within_budget(fields, budget, where)
