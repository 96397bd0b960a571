"""Advance the step counters and derive, in float64, the scalars that each tensor's update needs."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.algorithms import scalars_by
from dragon.kernels.norm import L2_NORM, NO_NORM, combine_partials
from dragon.kernels.scalars import hyperparameter, scalar_rows, store_scalar, tensor_hyperparameter

# `torch.nn.utils.clip_grad_norm_` divides by the norm plus this.
CLIP_EPS = tl.constexpr(1e-6)

MAX_FLOAT32 = tl.constexpr(float.fromhex("0x1.FFFFFEp127"))


@triton.jit
def clip_factor(norm, limit, eps):
    """Limit / (norm + eps), at most 1; 1 where there is no limit. NaN for a NaN norm, or if both are infinite."""
    total = norm + eps
    # It may be 0, of a tensor of zeros or a lane without a tensor.
    is_bounded = (limit > 0) & ((total == 0) == 0)
    factor = tl.minimum(limit / tl.where(is_bounded, total, 1.0), 1.0, tl.PropagateNan.ALL)
    return tl.where(is_bounded, factor, 1.0)


@triton.jit
def whole_norm(partials_ptr, counts_ptr, inverse_scale, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """The norm of all unscaled gradients together."""
    zero = tl.zeros((1,), tl.int64)
    end = zero + tl.load(counts_ptr + table.N_PARTIALS)
    # A sum of one element, which keeps a NaN.
    return tl.sum(combine_partials(partials_ptr, zero, end, 1, WIDTH, NORM) * inverse_scale, 0)


@triton.jit
def each_clip_factor(partials_ptr, tensor_ptr, group, inverse_scale, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """What brings the norm of each unscaled gradient down to its group's `clip_norm`."""
    first = tl.load(tensor_ptr + table.FIRST_PARTIAL, mask=group[3], other=0)
    end = tl.load(tensor_ptr + table.END_PARTIAL, mask=group[3], other=0)
    norm = combine_partials(partials_ptr, first, end, ROWS, WIDTH, L2_NORM) * inverse_scale
    limit = hyperparameter(group, table.CLIP_NORM)
    return clip_factor(norm, limit, 0.0)


@triton.jit
def store_common_scalars(group, target, lr, factor, active):
    """What every update needs: the gradient's factor and bound, both kinds of decay, the ema's rate."""
    weight_decay = hyperparameter(group, table.WEIGHT_DECAY)
    decoupled = hyperparameter(group, table.DECOUPLED) != 0
    clip_value = hyperparameter(group, table.CLIP_VALUE)
    store_scalar(target, table.ACTIVE, active.to(tl.float64))
    store_scalar(target, table.GRAD_SCALE, factor)
    # What fp32 cannot hold only an infinity exceeds: it becomes the largest number then.
    bound = tl.where(target[1], clip_value, tl.minimum(clip_value, MAX_FLOAT32))
    store_scalar(target, table.CLIP, tl.where(clip_value > 0, bound, float("inf")))
    store_scalar(target, table.L2, tl.where(decoupled, 0.0, weight_decay))
    store_scalar(target, table.DECAY, tl.where(decoupled, 1 - lr * weight_decay, 1.0))
    store_scalar(target, table.ONE_MINUS_EMA_DECAY, 1 - hyperparameter(group, table.EMA_DECAY))


@triton.jit
def advance_kernel(
    counts_ptr,  # int64 [COUNTS]
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    grads_ptr,  # int64 [n_tensors]
    groups_ptr,  # float64 [n_groups, GROUP_COLUMNS]
    sources_ptr,  # int64 [n_groups, SOURCE_COLUMNS]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS], written; rows without WIDE hold float32
    partials_ptr,  # float64 [n_partials], of `norm_kernel`
    grad_scale_ptr,  # fp32 or fp64 [1], gradients are divided by it
    found_inf_ptr,  # fp32 [1], positive to skip the step
    status_ptr,  # float64 [STATUS_COLUMNS], written by the first program
    ALGORITHM: tl.constexpr,
    NORM: tl.constexpr,
    CLIP_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Advance `ROWS` tensors a program, of any dtype; the grid is ``(cdiv(n_tensors, ROWS),)``.

    A skipped step, for a positive `found_inf` or a non-finite gradient norm in a group that asks for it, leaves
    the counters alone and clears ACTIVE, at which the update kernel leaves everything alone. The same for a tensor
    without a gradient.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < tl.load(counts_ptr + table.N_TENSORS)
    tensor_ptr = tensors_ptr + rows * table.TENSOR_COLUMNS
    group_index = tl.load(tensor_ptr + table.GROUP, mask=mask, other=0)
    group = (groups_ptr, sources_ptr, group_index, mask)

    skip = tl.load(found_inf_ptr) > 0
    inverse_scale = 1 / tl.load(grad_scale_ptr).to(tl.float64)
    if NORM != NO_NORM:
        norm = whole_norm(partials_ptr, counts_ptr, inverse_scale, WIDTH, NORM)
        skip |= (tl.load(groups_ptr + table.SKIP_NONFINITE) != 0) & ((norm < float("inf")) == 0)
        if tl.program_id(0) == 0:
            tl.store(status_ptr + table.GRAD_NORM, norm)
    factor = hyperparameter(group, table.GRAD_FACTOR) * inverse_scale
    if NORM != NO_NORM:
        factor *= clip_factor(norm, hyperparameter(group, table.MAX_GRAD_NORM), CLIP_EPS)
    if CLIP_EACH:
        factor *= each_clip_factor(partials_ptr, tensor_ptr, group, inverse_scale, ROWS, WIDTH)
    if (tl.program_id(0) == 0) & skip:
        tl.store(status_ptr + table.N_SKIPPED, tl.load(status_ptr + table.N_SKIPPED) + 1)

    # What belongs to a tensor without a gradient may be gone.
    present = tl.load(grads_ptr + rows, mask=mask, other=table.ABSENT) != table.ABSENT
    step_ptr = tl.load(tensor_ptr + table.STEP, mask=present, other=0).to(tl.pointer_type(tl.float32))
    has_step = step_ptr.to(tl.int64) != 0
    step = tl.load(step_ptr, mask=has_step, other=0.0) + 1
    active = tl.where(skip, False, present)
    tl.store(step_ptr, step, mask=has_step & active)

    wide = tl.load(tensor_ptr + table.WIDE, mask=mask, other=0) != 0
    target = scalar_rows(scalars_ptr, rows, wide, mask)
    lr = tensor_hyperparameter(group, table.LR, table.LR_SOURCE)
    store_common_scalars(group, target, lr, factor, active)
    scalars_by(group, target, lr, step.to(tl.float64), ALGORITHM)
