"""The SGD update, and the kernel that applies it to every chunk of every tensor in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.pointwise import scalar, update_chunks


@triton.jit
def sgd_update(
    param,
    grad,
    momentum_buffer,
    state_1,
    state_2,
    scalars_ptr,  # float64 [SCALAR_COLUMNS], this tensor's row
    N_STATES: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """One SGD step of a tile, in PyTorch's form of momentum.

    b <- momentum b + (1 - dampening) g;  p <- p - lr b, or p - lr (g + momentum b) with Nesterov's
    (Sutskever et al., https://proceedings.mlr.press/v28/sutskever13.html).
    """
    lr = scalar(scalars_ptr, table.STEP_SIZE, COMPUTE_DTYPE)
    if N_STATES > 0:
        decay = scalar(scalars_ptr, table.MOMENTUM_DECAY, COMPUTE_DTYPE)
        gain = scalar(scalars_ptr, table.MOMENTUM_GAIN, COMPUTE_DTYPE)
        nesterov = scalar(scalars_ptr, table.NESTEROV_FLAG, COMPUTE_DTYPE)
        momentum_buffer = decay * momentum_buffer + gain * grad
        grad = tl.where(nesterov != 0, grad + decay * momentum_buffer, momentum_buffer)
    return param - lr * grad, momentum_buffer, state_1, state_2


@triton.jit
def sgd_kernel(
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
    """Apply one SGD step to chunks of `CHUNK` elements; the grid is ``(n_chunks,)``, or any if persistent."""
    update_chunks(
        counts_ptr, chunks_ptr, tensors_ptr, scalars_ptr, sgd_update, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
        STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, CHUNK, N_THREADS, PERSISTENT,
    )  # fmt: skip
