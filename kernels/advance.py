"""Advance the step counters and derive, in float64, the scalars that each tensor's update needs."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.norm import L2_NORM, NO_NORM, combine_partials

# `torch.nn.utils.clip_grad_norm_` divides by the norm plus this.
CLIP_EPS = tl.constexpr(1e-6)


@triton.jit
def one_minus_power(base, exponent):
    """1 - base**exponent in float64 without cancellation, for 0 <= base < 1 and exponent >= 1.

    expm1(x) = (u - 1) x / log(u) with u = exp(x): W. Kahan, in N. Higham, Accuracy and Stability of Numerical
    Algorithms, section 1.14.1, https://doi.org/10.1137/1.9780898718027.
    """
    x = exponent * tl.log(tl.where(base > 0, base, 0.5))
    power = tl.exp(x)
    ordinary = (power > 0) & (power < 1)
    quotient = (1 - power) * x / tl.log(tl.where(ordinary, power, 0.5))
    return tl.where((base > 0) & (power > 0), tl.where(ordinary, quotient, -x), 1.0)


@triton.jit
def hyperparameter(groups_ptr, sources_ptr, group, COLUMN: tl.constexpr, SOURCE: tl.constexpr, mask):
    """The group's value, or what the device tensor named in the source table holds now."""
    value = tl.load(groups_ptr + group * table.GROUP_COLUMNS + COLUMN, mask=mask, other=0.0)
    source = tl.load(sources_ptr + group * table.SOURCE_COLUMNS + SOURCE, mask=mask, other=0)
    double = (source & 1) != 0
    single_ptr = source.to(tl.pointer_type(tl.float32))
    double_ptr = (source - 1).to(tl.pointer_type(tl.float64))
    single = tl.load(single_ptr, mask=mask & (source != 0) & (double == 0), other=0.0).to(tl.float64)
    value = tl.where(source != 0, single, value)
    return tl.where(double, tl.load(double_ptr, mask=mask & double, other=0.0), value)


@triton.jit
def clip_factor(norm, limit, eps):
    """Limit / (norm + eps), at most 1; 1 where there is no limit. A NaN norm gives NaN."""
    # Without a limit the norm may be 0, of a tensor of zeros or a lane without a tensor.
    factor = tl.minimum(limit / tl.where(limit > 0, norm + eps, 1.0), 1.0, tl.PropagateNan.ALL)
    return tl.where(limit > 0, factor, 1.0)


@triton.jit
def whole_norm(partials_ptr, counts_ptr, inverse_scale, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """The norm of all unscaled gradients together."""
    zero = tl.zeros((1,), tl.int64)
    end = zero + tl.load(counts_ptr + table.N_PARTIALS)
    # A sum of one element, which keeps a NaN.
    return tl.sum(combine_partials(partials_ptr, zero, end, 1, WIDTH, NORM) * inverse_scale, 0)


@triton.jit
def each_clip_factor(
    partials_ptr, tensor_ptr, group_ptr, inverse_scale, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """What brings the norm of each unscaled gradient down to its group's `clip_norm`."""
    first = tl.load(tensor_ptr + table.FIRST_PARTIAL, mask=mask, other=0)
    end = tl.load(tensor_ptr + table.END_PARTIAL, mask=mask, other=0)
    norm = combine_partials(partials_ptr, first, end, ROWS, WIDTH, L2_NORM) * inverse_scale
    limit = tl.load(group_ptr + table.CLIP_NORM, mask=mask, other=0.0)
    return clip_factor(tl.maximum(norm, limit, tl.PropagateNan.ALL), limit, 0.0)


@triton.jit
def store_common_scalars(row_ptr, group_ptr, lr, factor, active, mask):
    """What every update needs: the gradient's factor and bound, both kinds of decay, the average's rate."""
    weight_decay = tl.load(group_ptr + table.WEIGHT_DECAY, mask=mask, other=0.0)
    decoupled = tl.load(group_ptr + table.DECOUPLED, mask=mask, other=0.0) != 0
    clip_value = tl.load(group_ptr + table.CLIP_VALUE, mask=mask, other=0.0)
    ema_decay = tl.load(group_ptr + table.EMA_DECAY, mask=mask, other=0.0)
    tl.store(row_ptr + table.ACTIVE, active.to(tl.float64), mask=mask)
    tl.store(row_ptr + table.GRAD_SCALE, factor, mask=mask)
    tl.store(row_ptr + table.CLIP, tl.where(clip_value > 0, clip_value, float("inf")), mask=mask)
    tl.store(row_ptr + table.L2, tl.where(decoupled, 0.0, weight_decay), mask=mask)
    tl.store(row_ptr + table.DECAY, tl.where(decoupled, 1 - lr * weight_decay, 1.0), mask=mask)
    tl.store(row_ptr + table.ONE_MINUS_EMA_DECAY, 1 - ema_decay, mask=mask)


@triton.jit
def store_adam_scalars(row_ptr, group_ptr, lr, beta1, beta2, step, mask):
    """Step size and epsilon of a bias-corrected Adam step; see `dragon.kernels.adam.adam_update`."""
    correction2 = tl.sqrt(one_minus_power(beta2, step))
    step_size = lr * correction2 / one_minus_power(beta1, step)
    eps = tl.load(group_ptr + table.EPS, mask=mask, other=0.0)
    epsilon_hat = tl.load(group_ptr + table.EPSILON_HAT, mask=mask, other=0.0)
    tl.store(row_ptr + table.STEP_SIZE, step_size, mask=mask)
    tl.store(row_ptr + table.BETA1_FACTOR, beta1, mask=mask)
    tl.store(row_ptr + table.ONE_MINUS_BETA1, 1 - beta1, mask=mask)
    tl.store(row_ptr + table.BETA2_FACTOR, beta2, mask=mask)
    tl.store(row_ptr + table.ONE_MINUS_BETA2, 1 - beta2, mask=mask)
    tl.store(row_ptr + table.DENOM_EPS, tl.where(epsilon_hat != 0, eps, eps * correction2), mask=mask)


@triton.jit
def store_sgd_scalars(row_ptr, group_ptr, lr, momentum, dampening, step, mask):
    """Learning rate and momentum of an SGD step; the first gradient enters the buffer undamped."""
    nesterov = tl.load(group_ptr + table.NESTEROV, mask=mask, other=0.0)
    tl.store(row_ptr + table.STEP_SIZE, lr, mask=mask)
    tl.store(row_ptr + table.MOMENTUM_DECAY, momentum, mask=mask)
    tl.store(row_ptr + table.MOMENTUM_GAIN, tl.where(step > 1, 1 - dampening, 1.0), mask=mask)
    tl.store(row_ptr + table.NESTEROV_FLAG, nesterov, mask=mask)


@triton.jit
def advance_kernel(
    counts_ptr,  # int64 [COUNTS]
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    groups_ptr,  # float64 [n_groups, GROUP_COLUMNS]
    sources_ptr,  # int64 [n_groups, SOURCE_COLUMNS]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS], written
    partials_ptr,  # float64 [n_partials], of `norm_kernel`
    grad_scale_ptr,  # fp32 [1], gradients are divided by it
    found_inf_ptr,  # fp32 [1], positive to skip the step
    status_ptr,  # float64 [STATUS_COLUMNS], written by the first program
    IS_ADAM: tl.constexpr,
    NORM: tl.constexpr,
    CLIP_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Advance `ROWS` tensors a program; the grid is ``(cdiv(n_tensors, ROWS),)``.

    A skipped step, for a positive `found_inf` or a non-finite gradient norm in a group that asks for it, leaves
    the counters alone and clears ACTIVE, at which the update kernel leaves everything alone.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < tl.load(counts_ptr + table.N_TENSORS)
    tensor_ptr = tensors_ptr + rows * table.TENSOR_COLUMNS
    row_ptr = scalars_ptr + rows * table.SCALAR_COLUMNS
    group = tl.load(tensor_ptr + table.GROUP, mask=mask, other=0)
    group_ptr = groups_ptr + group * table.GROUP_COLUMNS

    skip = tl.load(found_inf_ptr) > 0
    inverse_scale = 1 / tl.load(grad_scale_ptr).to(tl.float64)
    factor = tl.load(group_ptr + table.GRAD_FACTOR, mask=mask, other=0.0) * inverse_scale
    if NORM != NO_NORM:
        norm = whole_norm(partials_ptr, counts_ptr, inverse_scale, WIDTH, NORM)
        factor *= clip_factor(norm, tl.load(group_ptr + table.MAX_GRAD_NORM, mask=mask, other=0.0), CLIP_EPS)
        skip |= (tl.load(groups_ptr + table.SKIP_NONFINITE) != 0) & ((norm < float("inf")) == 0)
        if tl.program_id(0) == 0:
            tl.store(status_ptr + table.GRAD_NORM, norm)
    if CLIP_EACH:
        factor *= each_clip_factor(partials_ptr, tensor_ptr, group_ptr, inverse_scale, mask, ROWS, WIDTH)
    if (tl.program_id(0) == 0) & skip:
        tl.store(status_ptr + table.N_SKIPPED, tl.load(status_ptr + table.N_SKIPPED) + 1)

    step_ptr = tl.load(tensor_ptr + table.STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    has_step = mask & (step_ptr.to(tl.int64) != 0)
    step = tl.load(step_ptr, mask=has_step, other=0.0) + 1
    active = mask & (skip == 0)
    tl.store(step_ptr, step, mask=has_step & active)

    lr = hyperparameter(groups_ptr, sources_ptr, group, table.LR, table.LR_SOURCE, mask)
    store_common_scalars(row_ptr, group_ptr, lr, factor, active, mask)
    if IS_ADAM:
        beta1 = hyperparameter(groups_ptr, sources_ptr, group, table.BETA1, table.BETA1_SOURCE, mask)
        beta2 = hyperparameter(groups_ptr, sources_ptr, group, table.BETA2, table.BETA2_SOURCE, mask)
        store_adam_scalars(row_ptr, group_ptr, lr, beta1, beta2, step.to(tl.float64), mask)
    else:
        momentum = tl.load(group_ptr + table.MOMENTUM, mask=mask, other=0.0)
        dampening = tl.load(group_ptr + table.DAMPENING, mask=mask, other=0.0)
        store_sgd_scalars(row_ptr, group_ptr, lr, momentum, dampening, step.to(tl.float64), mask)
