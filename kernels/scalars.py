"""Read the hyperparameters of a block of tensors, and write the scalars that their updates need.

Both sides are tuples, so that the functions of an algorithm take few arguments:

* `group` is ``(groups_ptr, sources_ptr, index, mask)``, the two tables and the group index of each tensor;
* `target` is ``(row_ptr, wide, narrow)``, a pointer to each row of scalars, and masks of the rows that hold
  float64 and float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table


@triton.jit
def hyperparameter(group, COLUMN: tl.constexpr):
    """A column of each tensor's group, in float64."""
    groups_ptr, _, index, mask = group
    return tl.load(groups_ptr + index * table.GROUP_COLUMNS + COLUMN, mask=mask, other=0.0)


@triton.jit
def tensor_hyperparameter(group, COLUMN: tl.constexpr, SOURCE: tl.constexpr):
    """A column of each tensor's group, or what the device tensor named in the source table holds now."""
    _, sources_ptr, index, mask = group
    value = hyperparameter(group, COLUMN)
    source = tl.load(sources_ptr + index * table.SOURCE_COLUMNS + SOURCE, mask=mask, other=0)
    double = (source & 1) != 0
    single_ptr = source.to(tl.pointer_type(tl.float32))
    double_ptr = (source - 1).to(tl.pointer_type(tl.float64))
    single = tl.load(single_ptr, mask=mask & (source != 0) & (double == 0), other=0.0).to(tl.float64)
    value = tl.where(source != 0, single, value)
    return tl.where(double, tl.load(double_ptr, mask=mask & double, other=0.0), value)


@triton.jit
def scalar_rows(scalars_ptr, rows, wide, mask):
    """The `target` of tensor rows, of which those with `wide` set take float64 scalars."""
    return (scalars_ptr + rows * table.SCALAR_COLUMNS, mask & wide, mask & (wide == 0))


@triton.jit
def store_scalar(target, COLUMN: tl.constexpr, value):
    """Write a float64 scalar of each tensor, rounded once to the dtype of its row."""
    row_ptr, wide, narrow = target
    tl.store(row_ptr + COLUMN, value, mask=wide)
    tl.store(row_ptr.to(tl.pointer_type(tl.float32)) + COLUMN, value.to(tl.float32), mask=narrow)
