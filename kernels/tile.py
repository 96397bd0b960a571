"""Find a tensor in the tables: its addresses, its scalars, and whether vectors of it may be accessed whole."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.rounding import random_words, random_words_each
from dragon.kernels.spec import compute_dtype, has_rest, has_words, n_states

# Elements of the widest vector path: 16 bytes of an 8-bit type, two accesses of bf16, four of fp32.
VECTOR_NUMEL = tl.constexpr(16)


# Threads of a warp on CDNA. Its compiler merges loads of neighbours that are the same for all threads, and keeps
# them in registers that the threads share. A block takes registers of each thread: 92 instead of 57 on gfx942.
MERGING_WARP_SIZE = tl.constexpr(64)


@triton.jit
def load_pair(pair_ptr, WARP_SIZE: tl.constexpr):
    """Two neighbours, in one access."""
    if WARP_SIZE == MERGING_WARP_SIZE:
        return tl.load(pair_ptr), tl.load(pair_ptr + 1)
    else:
        return tl.split(tl.load(pair_ptr + tl.arange(0, 2)))


@triton.jit
def load_four(four_ptr, WARP_SIZE: tl.constexpr):
    """Four neighbours: one access of 16 bytes for float32, two for float64."""
    if WARP_SIZE == MERGING_WARP_SIZE:
        return tl.load(four_ptr), tl.load(four_ptr + 1), tl.load(four_ptr + 2), tl.load(four_ptr + 3)
    else:
        even, odd = tl.split(tl.reshape(tl.load(four_ptr + tl.arange(0, 4)), (2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def load_scalars(scalars_ptr, row, SPEC: tl.constexpr, WARP_SIZE: tl.constexpr):
    """All scalars of a tensor in the dtype of the maths, a tuple by column. The compiler drops unused accesses."""
    row_ptr = (scalars_ptr + row * table.SCALAR_COLUMNS).to(tl.pointer_type(compute_dtype(SPEC)))
    scalars = ()
    for column in tl.static_range(0, table.SCALAR_COLUMNS, 4):
        scalars += load_four(row_ptr + column, WARP_SIZE)
    return scalars


@triton.jit
def load_scale(grad_scale_ptr, SPEC: tl.constexpr):
    """What gradients are divided by, in the dtype of the maths."""
    return tl.load(grad_scale_ptr).to(compute_dtype(SPEC))


@triton.jit
def load_tensors(tensors_ptr, grads_ptr, row, WARP_SIZE: tl.constexpr):
    """The element count of a tensor, the addresses of parameter, gradient, states and ema, and what rounds them.

    Each of these has a tuple of addresses, one for each part of its format. What decides the random words are the
    index of the first element, stream and seed, and the address of the step counter. The compiler drops unused
    accesses.
    """
    row_ptr = tensors_ptr + row * table.TENSOR_COLUMNS
    param, numel = load_pair(row_ptr + table.PARAM, WARP_SIZE)
    state_0, state_1 = load_pair(row_ptr + table.STATE_0, WARP_SIZE)
    state_2, ema = load_pair(row_ptr + table.STATE_2, WARP_SIZE)
    scale_0, scale_1 = load_pair(row_ptr + table.SCALE_0, WARP_SIZE)
    index_base, stream = load_pair(row_ptr + table.INDEX_BASE, WARP_SIZE)
    rest = tl.load(row_ptr + table.PARAM_REST)
    step = tl.load(row_ptr + table.STEP)
    seed = tl.load(row_ptr + table.SEED)
    grad = tl.load(grads_ptr + row)
    states = ((state_0, scale_0), (state_1, scale_1), (state_2,))
    return numel, ((param, rest), (grad,), states, (ema,)), (index_base, stream, seed, step)


@triton.jit
def are_aligned(tensors, source, SPEC: tl.constexpr):
    """Whether every address is a multiple of 16 bytes, so that vectors may be accessed whole.

    With random words the first element must start a call of the generator as well.
    """
    param, grad, states, ema = tensors
    low_bits = param[0] | grad[0]
    if has_rest(SPEC):
        low_bits |= param[1]
    for i in tl.static_range(n_states(SPEC)):
        low_bits |= states[i][0]
    if SPEC.average is not None:
        low_bits |= ema[0]
    if has_words(SPEC):
        low_bits |= source[0] & 7
    return (low_bits & 15) == 0


@triton.jit
def words_of(source, place, WHOLE_CALLS: tl.constexpr):
    """Two random words for each element of a tile: for the parameter, and for its second moment."""
    index_base, stream, seed, step_address = source
    step = tl.load(step_address.to(tl.pointer_type(tl.float32))).to(tl.int64)
    if WHOLE_CALLS:
        return random_words(index_base + place[2], seed, step, stream, place[0].shape[0])
    else:
        return random_words_each(index_base + place[0], seed, step, stream)


@triton.jit
def no_tiles():
    """An empty tuple to add tiles to."""
    return ()


@triton.jit
def ready_grad(grad, param, scalars):
    """The gradient that the update sees: scaled, clipped elementwise, with L2 decay added.

    Clipping and decay are jumped over where there are none. A decay of 0 is not multiplied, so that an infinite
    parameter keeps a finite moment.
    """
    clip = scalars[table.CLIP]
    weight_decay = scalars[table.L2]
    grad = grad * scalars[table.GRAD_SCALE]
    if clip < float("inf"):
        grad = tl.minimum(tl.maximum(grad, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)
    if weight_decay != 0:
        grad += weight_decay * param
    return grad
