"""Norms of the gradients: a first level of partial results, and how they combine. Always the same bits.

Squares are summed in float64. No finite gradient of 32 bits or fewer over- or underflows there. The L2 norm of
float64 gradients overflows for elements above 1.3e154 and loses those below 1e-154, as PyTorch's does.

Where float64 is slow, each lane sums the squares of its elements in float32. At most 12 roundings meet a square,
and the norm is off by at most 3 float32 eps. A span whose squares float32 could not hold is summed in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.formats import DTYPES, dtype_of
from dragon.kernels.tile import VECTOR_NUMEL, no_tiles

# Elements of a gradient that make one partial result, and of a tile on the way. They set the order of the
# additions and with it the last bits of a norm, so they are no subject of tuning.
SPAN = tl.constexpr(32768)
TILE = tl.constexpr(1024)

# Tiles whose loads are issued together: 128 bytes of fp32 a thread, as many as an update has in flight.
TILES_IN_FLIGHT = tl.constexpr(4)

# Bits of 2^-40 and 2^60, between which the largest magnitude of a span must be for sums in float32. Squares below
# 2^-126 may be lost, all together less than 2^-30 of the sum; no lane's sum gets above 2^125.
LEAST_PEAK = tl.constexpr(0x2B800000)
MOST_PEAK = tl.constexpr(0x5D800000)

# How `norm_kernel`'s partial results combine. NO_NORM: there are none.
NO_NORM = tl.constexpr(0)
L2_NORM = tl.constexpr(1)
INF_NORM = tl.constexpr(2)


@triton.constexpr_function
def total_dtype(name, norm, sum_dtype):
    """The dtype in which a tile of gradients is reduced.

    Absolute values are compared as integers: their bits have the same order, with NaN above infinity.
    """
    if norm == L2_NORM.value:
        return DTYPES[sum_dtype]
    return tl.int64 if name == "float64" else tl.int32


@triton.jit
def largest(tile, AXIS: tl.constexpr):
    """Largest of float64 values that are not negative, along an axis; NaN if one of them is.

    `tl.max` loses a NaN, and the bits of such values are in the order of integers.
    """
    bits = tl.abs(tile).to(tl.int64, bitcast=True)
    return tl.max(bits, AXIS).to(tl.float64, bitcast=True)


@triton.jit
def magnitude_bits(grad):
    """The bits of absolute values as int32."""
    return grad.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def accumulate(total, grad, GRAD_DTYPE: tl.constexpr, NORM: tl.constexpr):
    """Take a tile of gradients into a tile of partial results, of float64 for the L2 norm."""
    if NORM == INF_NORM:
        if GRAD_DTYPE == "float64":
            return tl.maximum(total, grad.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF)
        else:
            return tl.maximum(total, magnitude_bits(grad))
    else:
        grad = grad.to(tl.float64)
        if GRAD_DTYPE == "float64":
            return total + grad * grad
        else:
            # The square is exact, so that one rounding is the same as two.
            return tl.fma(grad, grad, total)


@triton.jit
def take_tiles(
    total,  # partial results
    peak,  # int32, bits of the largest magnitudes so far; kept for sums in float32 only
    grad_ptr,
    offsets,  # of the first tile
    end,
    N_TILES: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    NORM: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    """Take neighbouring tiles into a tile of partial results, in their order; what is past `end` counts as 0."""
    tiles = no_tiles()
    for i in tl.static_range(N_TILES):
        tiles += (tl.load(grad_ptr + (offsets + i * TILE), mask=offsets + i * TILE < end, other=0.0),)
    if (NORM == L2_NORM) & (SUM_DTYPE == "float32"):
        # A sum of these tiles alone: fewer roundings meet each square.
        squares = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(N_TILES):
            grad = tiles[i].to(tl.float32)
            squares += grad * grad
            peak = tl.maximum(peak, magnitude_bits(grad))
        total += squares
    else:
        for i in tl.static_range(N_TILES):
            total = accumulate(total, tiles[i], GRAD_DTYPE, NORM)
    return total, peak


@triton.jit
def take_rest(
    total, peak, grad_ptr, whole, end, GRAD_DTYPE: tl.constexpr, NORM: tl.constexpr, SUM_DTYPE: tl.constexpr
):
    """Take the elements behind the last whole vector, which are less than a vector."""
    if whole < end:
        # They keep the lanes that they would have had in the loop, and with them the order of additions.
        rest = whole // TILE * TILE + tl.arange(0, TILE)
        rest = tl.where(rest < whole, end, rest)
        total, peak = take_tiles(total, peak, grad_ptr, rest, end, 1, GRAD_DTYPE, NORM, SUM_DTYPE)
    return total, peak


@triton.jit
def exact_sum(address, first, end, GRAD_DTYPE: tl.constexpr):
    """The sum of the squares of a span, in float64 throughout."""
    grad_ptr = address.to(tl.pointer_type(dtype_of(GRAD_DTYPE)))
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float64)
    peak = tl.zeros((TILE,), tl.int32)
    while first < end:
        total, peak = take_tiles(total, peak, grad_ptr, first + lanes, end, 1, GRAD_DTYPE, L2_NORM, "float64")
        first += TILE
    return tl.sum(total, 0)


@triton.jit
def norm_kernel(
    spans_ptr,  # int32 [n_spans, 2], tensor row and span index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    grads_ptr,  # int64 [n_tensors]
    groups_ptr,  # float64 [n_groups, GROUP_COLUMNS]
    partials_ptr,  # float64 [n_partials of the device], each row's from its FIRST_PARTIAL on are written
    GRAD_DTYPE: tl.constexpr,
    NORM: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    """Reduce one span of one gradient, times its group's factor; the grid is ``(n_spans,)``."""
    span_ptr = spans_ptr + 2 * tl.program_id(0).to(tl.int64)
    row = tl.load(span_ptr).to(tl.int64)
    span = tl.load(span_ptr + 1).to(tl.int64)
    row_ptr = tensors_ptr + row * table.TENSOR_COLUMNS
    address = tl.load(grads_ptr + row)
    first = span * SPAN
    # A gradient that is absent has no elements.
    end = tl.where(address == table.ABSENT, first, tl.minimum(first + SPAN, tl.load(row_ptr + table.NUMEL)))
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), total_dtype(GRAD_DTYPE, NORM, SUM_DTYPE))
    peak = tl.zeros((TILE,), tl.int32)
    # Only whole vectors in the loop, so that the mask is constant over a vector and the accesses stay wide.
    whole = tl.multiple_of(end // VECTOR_NUMEL * VECTOR_NUMEL, VECTOR_NUMEL)
    start = first
    if (address & 15) == 0:
        grad_ptr = tl.multiple_of(address.to(tl.pointer_type(dtype_of(GRAD_DTYPE))), 16)
        while start < whole:
            total, peak = take_tiles(
                total, peak, grad_ptr, start + lanes, whole, TILES_IN_FLIGHT, GRAD_DTYPE, NORM, SUM_DTYPE
            )
            start += TILES_IN_FLIGHT * TILE
        total, peak = take_rest(total, peak, grad_ptr, whole, end, GRAD_DTYPE, NORM, SUM_DTYPE)
    else:
        grad_ptr = address.to(tl.pointer_type(dtype_of(GRAD_DTYPE)))
        # Sums in float32 depend on which tiles are taken at once, and must not depend on the path.
        IS_SHORT: tl.constexpr = SUM_DTYPE == "float32"
        N_TILES: tl.constexpr = TILES_IN_FLIGHT if IS_SHORT else 1
        stop = whole if IS_SHORT else end
        while start < stop:
            total, peak = take_tiles(
                total, peak, grad_ptr, start + lanes, stop, N_TILES, GRAD_DTYPE, NORM, SUM_DTYPE
            )
            start += N_TILES * TILE
        if IS_SHORT:
            total, peak = take_rest(total, peak, grad_ptr, whole, end, GRAD_DTYPE, NORM, SUM_DTYPE)
    group = tl.load(row_ptr + table.GROUP)
    factor = tl.abs(tl.load(groups_ptr + group * table.GROUP_COLUMNS + table.GRAD_FACTOR))
    partial_ptr = partials_ptr + tl.load(row_ptr + table.FIRST_PARTIAL) + span
    if NORM == INF_NORM:
        peak = tl.max(total, 0).to(dtype_of("float64" if GRAD_DTYPE == "float64" else "float32"), bitcast=True)
        tl.store(partial_ptr, peak.to(tl.float64) * factor)
    else:
        square_sum = tl.sum(total.to(tl.float64), 0)
        if SUM_DTYPE == "float32":
            bits = tl.max(peak, 0)
            if (bits > 0) & ((bits < LEAST_PEAK) | (bits > MOST_PEAK)):
                square_sum = exact_sum(address, first, end, GRAD_DTYPE)
        tl.store(partial_ptr, square_sum * factor * factor)


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
