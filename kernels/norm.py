"""Norms of the gradients: a first level of partial results, and how they combine. Always the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.pointwise import VECTOR_NUMEL, address

# Elements of a gradient that make one partial result, and of a tile on the way. They set the order of the
# additions and with it the last bits of a norm, so they are no subject of tuning.
SPAN = tl.constexpr(32768)
TILE = tl.constexpr(1024)

# How `norm_kernel`'s partial results combine. NO_NORM: there are none.
NO_NORM = tl.constexpr(0)
L2_NORM = tl.constexpr(1)
INF_NORM = tl.constexpr(2)


@triton.jit
def largest(tile, AXIS: tl.constexpr):
    """Largest of float64 values that are not negative, along an axis; NaN if one of them is.

    `tl.max` loses a NaN. The bits of such values are in the same order as integers, with NaN above infinity.
    """
    bits = tl.abs(tile).to(tl.int64, bitcast=True)
    return tl.max(bits, AXIS).to(tl.float64, bitcast=True)


@triton.jit
def accumulate(total, grad, NORM: tl.constexpr):
    """Take a tile of gradients into a tile of float64 partial results.

    Squares are taken in float64, where no finite fp32 value over- or underflows.
    """
    grad = grad.to(tl.float64)
    if NORM == INF_NORM:
        return tl.maximum(total, tl.abs(grad), tl.PropagateNan.ALL)
    return total + grad * grad


@triton.jit
def norm_kernel(
    spans_ptr,  # int32 [n_partials, 2], tensor row and span index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    groups_ptr,  # float64 [n_groups, GROUP_COLUMNS]
    partials_ptr,  # float64 [n_partials of the device], each row's from its FIRST_PARTIAL on are written
    GRAD_DTYPE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Reduce one span of one gradient, times its group's factor; the grid is ``(n_partials,)``."""
    span_ptr = spans_ptr + 2 * tl.program_id(0).to(tl.int64)
    row = tl.load(span_ptr).to(tl.int64)
    span = tl.load(span_ptr + 1).to(tl.int64)
    first = span * SPAN
    row_ptr = tensors_ptr + row * table.TENSOR_COLUMNS
    numel = tl.load(row_ptr + table.NUMEL)
    end = tl.minimum(first + SPAN, numel)
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float64)
    if tl.load(row_ptr + table.VECTOR) != 0:
        grad_ptr = address(row_ptr, table.GRAD, GRAD_DTYPE, 16)
        whole = tl.multiple_of(end // VECTOR_NUMEL * VECTOR_NUMEL, VECTOR_NUMEL)
        for start in range(0, SPAN, TILE):
            offsets = first + start + lanes
            if first + start < end:
                total = accumulate(total, tl.load(grad_ptr + offsets, mask=offsets < whole, other=0.0), NORM)
                rest = (offsets >= whole) & (offsets < end)
                total = accumulate(total, tl.load(grad_ptr + offsets, mask=rest, other=0.0), NORM)
    else:
        grad_ptr = address(row_ptr, table.GRAD, GRAD_DTYPE, 1)
        for start in range(0, SPAN, TILE):
            offsets = first + start + lanes
            if first + start < end:
                total = accumulate(total, tl.load(grad_ptr + offsets, mask=offsets < end, other=0.0), NORM)
    group = tl.load(row_ptr + table.GROUP)
    factor = tl.abs(tl.load(groups_ptr + group * table.GROUP_COLUMNS + table.GRAD_FACTOR))
    partial_ptr = partials_ptr + tl.load(row_ptr + table.FIRST_PARTIAL) + span
    if NORM == INF_NORM:
        tl.store(partial_ptr, largest(total, 0) * factor)
    else:
        tl.store(partial_ptr, tl.sum(total, 0) * factor * factor)


@triton.jit
def combine_partials(partials_ptr, first, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """The norms [ROWS] of the partial results [first, end) of each row, always in the same order."""
    lanes = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float64)
    start = first
    while tl.max(end - start) > 0:
        offsets = start[:, None] + lanes
        partial = tl.load(partials_ptr + offsets, mask=offsets < end[:, None], other=0.0)
        if NORM == INF_NORM:
            total = tl.maximum(total, partial, tl.PropagateNan.ALL)
        else:
            total += partial
        start += WIDTH
    if NORM == INF_NORM:
        return largest(total, 1)
    return tl.sqrt(tl.sum(total, 1))
