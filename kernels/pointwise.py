"""Walk one chunk of a tensor: everything around an elementwise update that is not its maths."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table

# Elements of the widest vector path: 16 bytes of an 8-bit type, two accesses of bf16, four of fp32.
VECTOR_NUMEL = tl.constexpr(16)


@triton.jit
def load_tile(pointer, offsets, mask, COMPUTE_DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    """Load a tile in the dtype of the maths; elements outside the mask are 0."""
    return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(COMPUTE_DTYPE)


@triton.jit
def store_tile(pointer, offsets, tile, mask, EVICTION: tl.constexpr):
    """Store a tile, rounded to the pointer's dtype."""
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask, eviction_policy=EVICTION)


@triton.jit
def address(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The typed pointer that a column of a table row holds, known to be a multiple of `ALIGNMENT` bytes."""
    return tl.multiple_of(tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def scalar(scalars_ptr, COLUMN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """A float64 column of a row of scalars, rounded once to the dtype of the maths."""
    return tl.load(scalars_ptr + COLUMN).to(COMPUTE_DTYPE)


@triton.jit
def ready_grad(grad, param, scalars_ptr, COMPUTE_DTYPE: tl.constexpr):
    """The gradient that the update sees: scaled, clipped elementwise, with L2 decay added.

    The decay is selected, not multiplied by 0, so that an infinite parameter without decay keeps a finite moment.
    """
    clip = scalar(scalars_ptr, table.CLIP, COMPUTE_DTYPE)
    weight_decay = scalar(scalars_ptr, table.L2, COMPUTE_DTYPE)
    grad = grad * scalar(scalars_ptr, table.GRAD_SCALE, COMPUTE_DTYPE)
    grad = tl.minimum(tl.maximum(grad, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)
    return tl.where(weight_decay == 0, grad, grad + weight_decay * param)


@triton.jit
def _update_tile(
    row_ptr,  # int64 [TENSOR_COLUMNS], this tensor's row
    scalars_ptr,  # float64 [SCALAR_COLUMNS], this tensor's row
    offsets,  # int64 [n]
    mask,  # int1 [n]
    UPDATE: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    EVICTION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    param_ptr = address(row_ptr, table.PARAM, PARAM_DTYPE, ALIGNMENT)
    grad_ptr = address(row_ptr, table.GRAD, GRAD_DTYPE, ALIGNMENT)
    state_0_ptr = address(row_ptr, table.STATE_0, STATE_DTYPE, ALIGNMENT)
    state_1_ptr = address(row_ptr, table.STATE_1, STATE_DTYPE, ALIGNMENT)
    state_2_ptr = address(row_ptr, table.STATE_2, STATE_DTYPE, ALIGNMENT)
    param = load_tile(param_ptr, offsets, mask, COMPUTE_DTYPE, EVICTION)
    grad = load_tile(grad_ptr, offsets, mask, COMPUTE_DTYPE, EVICTION)
    # A state that the variant does not have is never read: it stands for any tile of the right type.
    state_0 = param
    state_1 = param
    state_2 = param
    if N_STATES > 0:
        state_0 = load_tile(state_0_ptr, offsets, mask, COMPUTE_DTYPE, EVICTION)
    if N_STATES > 1:
        state_1 = load_tile(state_1_ptr, offsets, mask, COMPUTE_DTYPE, EVICTION)
    if N_STATES > 2:
        state_2 = load_tile(state_2_ptr, offsets, mask, COMPUTE_DTYPE, EVICTION)

    grad = ready_grad(grad, param, scalars_ptr, COMPUTE_DTYPE)
    param *= scalar(scalars_ptr, table.DECAY, COMPUTE_DTYPE)
    param, state_0, state_1, state_2 = UPDATE(
        param, grad, state_0, state_1, state_2, scalars_ptr, N_STATES, COMPUTE_DTYPE
    )

    store_tile(param_ptr, offsets, param, mask, EVICTION)
    if N_STATES > 0:
        store_tile(state_0_ptr, offsets, state_0, mask, EVICTION)
    if N_STATES > 1:
        store_tile(state_1_ptr, offsets, state_1, mask, EVICTION)
    if N_STATES > 2:
        store_tile(state_2_ptr, offsets, state_2, mask, EVICTION)
    if AVERAGE:
        ema_ptr = address(row_ptr, table.EMA, STATE_DTYPE, ALIGNMENT)
        ema = load_tile(ema_ptr, offsets, mask, COMPUTE_DTYPE, EVICTION)
        # The average is of the parameter as it is stored.
        param = param.to(PARAM_DTYPE).to(COMPUTE_DTYPE)
        ema += scalar(scalars_ptr, table.ONE_MINUS_EMA_DECAY, COMPUTE_DTYPE) * (param - ema)
        store_tile(ema_ptr, offsets, ema, mask, EVICTION)
    if ZERO_GRAD:
        store_tile(grad_ptr, offsets, tl.zeros_like(param), mask, EVICTION)


@triton.jit
def _update_chunk(
    chunk_ptr,  # int32 [2], tensor row and chunk index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS]
    UPDATE: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    EVICTION: tl.constexpr,
    CHUNK: tl.constexpr,
    N_THREADS: tl.constexpr,
):
    row = tl.load(chunk_ptr).to(tl.int64)
    first = tl.load(chunk_ptr + 1).to(tl.int64) * CHUNK
    row_ptr = tensors_ptr + row * table.TENSOR_COLUMNS
    scalars_ptr += row * table.SCALAR_COLUMNS
    numel = tl.load(row_ptr + table.NUMEL)
    if tl.load(scalars_ptr + table.ACTIVE) != 0:
        if tl.load(row_ptr + table.VECTOR) != 0:
            # Only whole vectors here, so that the mask is constant over a vector and the accesses stay wide.
            end = tl.multiple_of(numel // VECTOR_NUMEL * VECTOR_NUMEL, VECTOR_NUMEL)
            offsets = first + tl.arange(0, CHUNK)
            _update_tile(
                row_ptr, scalars_ptr, offsets, offsets < end, UPDATE, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
                STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, 16,
            )  # fmt: skip
            if (first + CHUNK > end) & (end < numel):
                tail = end + tl.arange(0, VECTOR_NUMEL)
                _update_tile(
                    row_ptr, scalars_ptr, tail, tail < numel, UPDATE, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
                    STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, 16,
                )  # fmt: skip
        else:
            # One element a thread and a loop: as one block this path would set the registers of the whole kernel.
            for start in range(0, CHUNK, N_THREADS):
                single = first + start + tl.arange(0, N_THREADS)
                _update_tile(
                    row_ptr, scalars_ptr, single, single < numel, UPDATE, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
                    STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, 1,
                )  # fmt: skip
    elif ZERO_GRAD:
        # A skipped step drops its gradients all the same: what is infinite must not be added to.
        grad_ptr = address(row_ptr, table.GRAD, GRAD_DTYPE, 1)
        for start in range(0, CHUNK, N_THREADS):
            single = first + start + tl.arange(0, N_THREADS)
            store_tile(grad_ptr, single, tl.zeros((N_THREADS,), COMPUTE_DTYPE), single < numel, EVICTION)


@triton.jit
def update_chunks(
    counts_ptr,  # int64 [COUNTS]
    chunks_ptr,  # int32 [n_chunks, 2], tensor row and chunk index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS]
    UPDATE: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    EVICTION: tl.constexpr,
    CHUNK: tl.constexpr,
    N_THREADS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Apply `UPDATE` to the chunk of `CHUNK` elements that this program is given, or to each that falls to it.

    `UPDATE` maps ``(param, grad, state_0, state_1, state_2, scalars_ptr, N_STATES, COMPUTE_DTYPE)`` to the new
    ``(param, state_0, state_1, state_2)``, all tiles.
    """
    index = tl.program_id(0).to(tl.int64)
    if PERSISTENT:
        n_chunks = tl.load(counts_ptr + table.N_CHUNKS)
        while index < n_chunks:
            _update_chunk(
                chunks_ptr + 2 * index, tensors_ptr, scalars_ptr, UPDATE, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
                STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, CHUNK, N_THREADS,
            )  # fmt: skip
            index += tl.num_programs(0)
    else:
        _update_chunk(
            chunks_ptr + 2 * index, tensors_ptr, scalars_ptr, UPDATE, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
            STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, CHUNK, N_THREADS,
        )  # fmt: skip


@triton.jit
def divide(numerator, denominator):
    """Correctly rounded quotient, in fp32 or fp64."""
    # One expression: what follows an early `return` is compiled too, and div_rn takes no fp64.
    return numerator / denominator if denominator.dtype == tl.float64 else tl.div_rn(numerator, denominator)


@triton.jit
def square_root(tile):
    """Correctly rounded square root, in fp32 or fp64."""
    return tl.sqrt(tile) if tile.dtype == tl.float64 else tl.sqrt_rn(tile)
