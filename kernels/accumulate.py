"""Sum gradients over backward passes: one launch adds every gradient to its accumulator."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels.pointwise import update_chunks


@triton.jit
def accumulate_update(
    param, grad, state_0, state_1, state_2, scalars_ptr, N_STATES: tl.constexpr, COMPUTE_DTYPE: tl.constexpr
):
    """Add a tile of a gradient to its accumulator, which stands in the table as the parameter."""
    return param + grad, state_0, state_1, state_2


@triton.jit
def accumulate_kernel(
    counts_ptr,  # int64 [COUNTS]
    chunks_ptr,  # int32 [n_chunks, 2], tensor row and chunk index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS]
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
    """Add gradients to their accumulators chunk by chunk; the grid is ``(n_chunks,)``, or any if persistent."""
    update_chunks(
        counts_ptr, chunks_ptr, tensors_ptr, scalars_ptr, accumulate_update, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
        STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, CHUNK, N_THREADS, PERSISTENT,
    )  # fmt: skip
