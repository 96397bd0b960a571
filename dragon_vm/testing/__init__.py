"""Parity kit: judge any Adam or SGD against an extended-precision reference, in units of the operand's eps.

Needs torch, numpy and Hypothesis only. A parity suite for one's own optimizer:

    from hypothesis import given, settings
    from dragon.vm.testing import adam_cases, check_adam

    @settings(deadline=None)
    @given(adam_cases())
    def test_my_adam_takes_every_step_right(case):
        check_adam(MyAdam, case)
"""

from .budget import DEFAULT_BUDGET, Budget
from .cases import (
    DENSE_LAYOUTS,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    GradientCase,
    GroupCase,
    OptimizerCase,
    StepCase,
    TensorCase,
)
from .fence import Fenced, FenceError, protected_tensor
from .fused import fused_adam_step, fused_sgd_step
from .harness import check_adam, check_sgd
from .judge import (
    FieldErrors,
    ParityError,
    adam_errors,
    assert_adam_step,
    assert_within_budget,
    default_compute_dtype,
    errors_in_units,
    sgd_errors,
)
from .records import AdamOptions, AdamState, SGDOptions, SGDState
from .reference import AdamReference, SGDReference, adam_reference, bias_correction, sgd_reference
from .strategies import (
    ADAM_OPTIONS,
    BLOCK_BORDERS,
    SGD_OPTIONS,
    adam_cases,
    gradient_cases,
    hyperparameters,
    numels,
    sgd_cases,
    tensor_cases,
)
from .units import AdamUnits, SGDUnits, adam_units, sgd_units

__all__ = [
    "ADAM_OPTIONS",
    "BLOCK_BORDERS",
    "DEFAULT_BUDGET",
    "DENSE_LAYOUTS",
    "GRADIENT_LAYOUTS",
    "LAYOUTS",
    "SGD_OPTIONS",
    "AdamOptions",
    "AdamReference",
    "AdamState",
    "AdamUnits",
    "Budget",
    "FenceError",
    "Fenced",
    "FieldErrors",
    "GradientCase",
    "GroupCase",
    "OptimizerCase",
    "ParityError",
    "SGDOptions",
    "SGDReference",
    "SGDState",
    "SGDUnits",
    "StepCase",
    "TensorCase",
    "adam_cases",
    "adam_errors",
    "adam_reference",
    "adam_units",
    "assert_adam_step",
    "assert_within_budget",
    "bias_correction",
    "check_adam",
    "check_sgd",
    "default_compute_dtype",
    "errors_in_units",
    "fused_adam_step",
    "fused_sgd_step",
    "gradient_cases",
    "hyperparameters",
    "numels",
    "protected_tensor",
    "sgd_cases",
    "sgd_errors",
    "sgd_reference",
    "sgd_units",
    "tensor_cases",
]
