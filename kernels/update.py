"""The update kernel: walk the chunks of every tensor of a `Spec`, with any algorithm, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.algorithms import update_by
from dragon.kernels.formats import load_tile, make_place, open_parts, store_tile
from dragon.kernels.maths import divide
from dragon.kernels.spec import (
    average_format,
    compute_dtype,
    grad_format,
    has_blocks,
    has_words,
    n_states,
    param_format,
    single_numel,
    state_format,
)
from dragon.kernels.tile import (
    VECTOR_NUMEL,
    are_aligned,
    load_pair,
    load_scalars,
    load_scale,
    load_tensors,
    no_tiles,
    ready_grad,
    words_of,
)


@triton.jit
def update_tile(
    tensors,  # addresses of parameter, gradient, states and ema
    source,  # of random words
    scalars,  # in the dtype of the maths, by column
    place,  # of the tile
    grad_scale,  # what the gradient that stays behind is divided by; None to leave it as it is
    SPEC: tl.constexpr,
    EVICTION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Load a tile of each tensor, update it, and store it."""
    COMPUTE_DTYPE: tl.constexpr = compute_dtype(SPEC)
    param_parts = open_parts(tensors[0], param_format(SPEC), ALIGNMENT)
    grad_parts = open_parts(tensors[1], grad_format(SPEC), ALIGNMENT)
    param = load_tile(param_parts, place, param_format(SPEC), COMPUTE_DTYPE, EVICTION)
    grad = load_tile(grad_parts, place, grad_format(SPEC), COMPUTE_DTYPE, EVICTION)
    states = no_tiles()
    for i in tl.static_range(n_states(SPEC)):
        state_parts = open_parts(tensors[2][i], state_format(SPEC, i), ALIGNMENT)
        states += (load_tile(state_parts, place, state_format(SPEC, i), COMPUTE_DTYPE, EVICTION),)
    if SPEC.average is not None:
        ema_parts = open_parts(tensors[3], average_format(SPEC), ALIGNMENT)
        ema = load_tile(ema_parts, place, average_format(SPEC), COMPUTE_DTYPE, EVICTION)

    if (grad_scale is not None) and not SPEC.zero_grad:
        # Before the update, which then holds no second gradient in registers. The format is plain: no words.
        unscaled_grad = divide(grad, grad_scale)
        store_tile(grad_parts, place, unscaled_grad, unscaled_grad, grad_format(SPEC), EVICTION)
    grad = ready_grad(grad, param, scalars)
    param *= scalars[table.DECAY]
    param, states = update_by(param, grad, states, scalars, SPEC)

    # Where nothing is rounded stochastically, anything serves as words.
    words = (grad, grad)
    if has_words(SPEC):
        words = words_of(source, place, ALIGNMENT > 1)
    param = store_tile(param_parts, place, param, words[0], param_format(SPEC), EVICTION)
    for i in tl.static_range(n_states(SPEC)):
        state_parts = open_parts(tensors[2][i], state_format(SPEC, i), ALIGNMENT)
        store_tile(state_parts, place, states[i], words[1], state_format(SPEC, i), EVICTION)
    if SPEC.average is not None:
        # The average is of the parameter as it is stored.
        ema += scalars[table.ONE_MINUS_EMA_DECAY] * (param - ema)
        store_tile(ema_parts, place, ema, words[0], average_format(SPEC), EVICTION)
    if SPEC.zero_grad:
        store_tile(grad_parts, place, tl.zeros_like(grad), words[0], grad_format(SPEC), EVICTION)


@triton.jit
def update_chunk(
    chunk_ptr,  # int32 [2], tensor row and chunk index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    grads_ptr,  # int64 [n_tensors]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS]
    grad_scale_ptr,  # fp32 [1], or None
    SPEC: tl.constexpr,
    CONFIG: tl.constexpr,
    WARP_SIZE: tl.constexpr,
):
    """Update one chunk of one tensor, or only drop its gradient where the step is skipped."""
    CHUNK: tl.constexpr = CONFIG.chunk
    EVICTION: tl.constexpr = CONFIG.eviction
    # Of the misaligned path: an element a thread, but whole blocks.
    SINGLES: tl.constexpr = single_numel(SPEC, CONFIG.n_warps * WARP_SIZE)
    row, index = load_pair(chunk_ptr, WARP_SIZE)
    row = row.to(tl.int64)
    first = index.to(tl.int64) * CHUNK
    scalars = load_scalars(scalars_ptr, row, SPEC, WARP_SIZE)
    numel, tensors, source = load_tensors(tensors_ptr, grads_ptr, row, WARP_SIZE)
    end = tl.minimum(first + CHUNK, numel)
    # Triton 3.6 does not return None from a function.
    grad_scale = grad_scale_ptr
    if grad_scale_ptr is not None:
        grad_scale = load_scale(grad_scale_ptr, SPEC)
    if scalars[table.ACTIVE] != 0:
        if are_aligned(tensors, source, SPEC):
            # Only whole vectors here, so that the mask is constant over a vector and the accesses stay wide.
            whole = tl.multiple_of(numel // VECTOR_NUMEL * VECTOR_NUMEL, VECTOR_NUMEL)
            # Decided at compile time, so that no tile of less than a block is built.
            if not has_blocks(SPEC):  # noqa: SIM102  # see above
                if (first + CHUNK > whole) & (whole < numel):
                    tail = make_place(whole, numel, VECTOR_NUMEL)
                    update_tile(tensors, source, scalars, tail, grad_scale, SPEC, EVICTION, 16)
            update_tile(tensors, source, scalars, make_place(first, whole, CHUNK), grad_scale, SPEC, EVICTION, 16)
        else:
            # A loop: as one block this path would set the registers of the whole kernel.
            while first < end:
                single = make_place(first, numel, SINGLES)
                update_tile(tensors, source, scalars, single, grad_scale, SPEC, EVICTION, 1)
                first += SINGLES
    elif SPEC.zero_grad:
        # A skipped step drops its gradients all the same: what is infinite must not be added to.
        end = tl.where(tensors[1][0] == table.ABSENT, first, end)
        grad_parts = open_parts(tensors[1], grad_format(SPEC), 1)
        while first < end:
            zeros = tl.zeros((SINGLES,), compute_dtype(SPEC))
            store_tile(grad_parts, make_place(first, numel, SINGLES), zeros, zeros, grad_format(SPEC), EVICTION)
            first += SINGLES


@triton.jit
def update_kernel(
    chunks_ptr,  # int32 [1 + n_chunks, 2], (n_chunks, 0), then tensor row and chunk index within the tensor
    tensors_ptr,  # int64 [n_tensors, TENSOR_COLUMNS]
    grads_ptr,  # int64 [n_tensors]
    scalars_ptr,  # float64 [n_tensors, SCALAR_COLUMNS]
    grad_scale_ptr,  # fp32 [1], what the gradients that stay behind are divided by; None to leave them as they are
    SPEC: tl.constexpr,
    CONFIG: tl.constexpr,
    WARP_SIZE: tl.constexpr,
):
    """Update the chunk that this program is given; with a persistent grid, each that falls to it.

    The grid is ``(n_chunks,)``, or any if `CONFIG` is persistent.
    """
    index = tl.program_id(0).to(tl.int64)
    if CONFIG.programs_per_processor > 0:
        n_chunks = tl.load(chunks_ptr)
        while index < n_chunks:
            chunk_ptr = chunks_ptr + 2 * (index + 1)
            update_chunk(chunk_ptr, tensors_ptr, grads_ptr, scalars_ptr, grad_scale_ptr, SPEC, CONFIG, WARP_SIZE)
            index += tl.num_programs(0)
    else:
        chunk_ptr = chunks_ptr + 2 * (index + 1)
        update_chunk(chunk_ptr, tensors_ptr, grads_ptr, scalars_ptr, grad_scale_ptr, SPEC, CONFIG, WARP_SIZE)
