"""What is compiled into `update_kernel`: one frozen record, read in the kernel as a compile-time constant."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from dragon.kernels.constant import Constant
from dragon.kernels.formats import DTYPES, PARTS


@dataclass(frozen=True)
class Spec(Constant):
    """An algorithm and the storage format of each tensor that it walks.

    A format is named as in `dragon.kernels.formats`; that of a plain tensor is its dtype, as in "float32".
    Triton caches a compiled kernel by the text of this record.

    Attributes:
        algorithm: "adam", "sgd" or "accumulate".
        param: format of the parameter, or of the sum that gradients are added to.
        grad: dtype of the gradient.
        states: format of each state in the order of the table's columns.
        average: format of the ema of the parameter; None for no ema.
        zero_grad: set the gradient to zero on the way.
    """

    algorithm: str
    param: str
    grad: str
    states: tuple[str, ...] = ()
    average: str | None = None
    zero_grad: bool = False


# The kernels read text fields through these functions: Triton 3.6 passes text to a function only as a constexpr.


@triton.constexpr_function
def compute_dtype(spec):
    """The dtype of the maths: float64 for float64 parameters, else float32."""
    return tl.float64 if spec.param == "float64" else tl.float32


@triton.constexpr_function
def param_format(spec):
    """The storage format of the parameter."""
    return spec.param


@triton.constexpr_function
def grad_format(spec):
    """The storage format of the gradient."""
    return spec.grad


@triton.constexpr_function
def state_format(spec, index):
    """The storage format of one state."""
    return spec.states[index]


@triton.constexpr_function
def average_format(spec):
    """The storage format of the ema."""
    return spec.average


@triton.constexpr_function
def has_blocks(spec):
    """Whether blocks of some state share a scale: such tensors have whole blocks only."""
    return any(name.startswith("q8_") for name in spec.states)


@triton.constexpr_function
def single_numel(spec, n_threads):
    """Elements of a tile on the path of misaligned tensors."""
    return max(n_threads, 64) if any(name.startswith("q8_") for name in spec.states) else n_threads


@triton.constexpr_function
def has_words(spec):
    """Whether an update needs random words."""
    return any(name.endswith("_stochastic") for name in (spec.param, *spec.states))


@triton.constexpr_function
def has_rest(spec):
    """Whether the parameter has a second part."""
    return spec.param not in DTYPES and len(PARTS[spec.param]) > 1


@triton.constexpr_function
def has_bound(spec):
    """Whether Adam's first moment is clamped to what the second one allows: if stored ones may exceed that.

    They may if some state is not plain. So may those in fp16, where small numbers do not decay, beside another
    dtype.
    """
    is_stalling = spec.states[0] == "float16" != spec.states[1]
    return spec.param != "float64" and (is_stalling or any(name not in DTYPES for name in spec.states))


@triton.constexpr_function
def n_states(spec):
    """The number of states."""
    return len(spec.states)
