"""The Adam update, and the kernel that applies it to every chunk of every tensor in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.pointwise import divide, scalar, square_root, update_chunks


@triton.jit
def adam_update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    scalars_ptr,  # float64 [SCALAR_COLUMNS], this tensor's row
    N_STATES: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """One Adam step of a tile.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  p <- p - step_size m / (sqrt(v) + eps')

    with step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t), and eps' = eps for the epsilon-hat of section 2 of
    Kingma & Ba, https://arxiv.org/abs/1412.6980, or eps' = eps sqrt(1 - beta2^t) for their algorithm 1, which is
    PyTorch's. With three states it is AMSGrad (Reddi et al., https://openreview.net/forum?id=ryQu7f-RZ), which
    divides by the largest v so far.
    """
    beta1 = scalar(scalars_ptr, table.BETA1_FACTOR, COMPUTE_DTYPE)
    one_minus_beta1 = scalar(scalars_ptr, table.ONE_MINUS_BETA1, COMPUTE_DTYPE)
    beta2 = scalar(scalars_ptr, table.BETA2_FACTOR, COMPUTE_DTYPE)
    one_minus_beta2 = scalar(scalars_ptr, table.ONE_MINUS_BETA2, COMPUTE_DTYPE)
    step_size = scalar(scalars_ptr, table.STEP_SIZE, COMPUTE_DTYPE)
    eps = scalar(scalars_ptr, table.DENOM_EPS, COMPUTE_DTYPE)

    # Not m + (1 - beta1) (g - m): for a small beta1 that leaves the rounding of a large m in the result.
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    largest = exp_avg_sq
    if N_STATES > 2:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, tl.PropagateNan.ALL)
        largest = max_exp_avg_sq
    denom = square_root(largest) + eps
    param = param - step_size * divide(exp_avg, denom)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def adam_kernel(
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
    """Apply one Adam step to chunks of `CHUNK` elements; the grid is ``(n_chunks,)``, or any if persistent."""
    update_chunks(
        counts_ptr, chunks_ptr, tensors_ptr, scalars_ptr, adam_update, N_STATES, PARAM_DTYPE, GRAD_DTYPE,
        STATE_DTYPE, COMPUTE_DTYPE, AVERAGE, ZERO_GRAD, EVICTION, CHUNK, N_THREADS, PERSISTENT,
    )  # fmt: skip
