"""Launch the kernels: grids, compile-time constants and options, in one place."""

from __future__ import annotations

from typing import Any

import triton

from dragon.kernels.advance import advance_kernel
from dragon.kernels.config import LaunchConfig
from dragon.kernels.norm import norm_kernel
from dragon.kernels.spec import Spec
from dragon.kernels.update import update_kernel

# Whether kernels run in triton's interpreter, which takes tensors of any device.
INTERPRETED = not isinstance(update_kernel, triton.runtime.JITFunction)

# Contraction into fused multiply-adds is left off: it is not the same on the aligned and the misaligned path, and
# the result must not depend on the path. The kernels are bound by memory, so it costs nothing.
COMPILE_OPTIONS = {"enable_fp_fusion": False}

# Threads of a program of `norm_kernel` and of `advance_kernel`, which are not tuned. More of them would read less
# than 16 bytes each of a tile of bf16.
REDUCTION_THREADS = 128


def update_constants(spec: Spec, config: LaunchConfig, warp_size: int = 32) -> dict[str, Any]:
    """Compile-time constants of `update_kernel`."""
    return {
        "SPEC": spec,
        "CONFIG": config,
        "WARP_SIZE": warp_size,
    }


def advance_constants(algorithm: str, norm_kind: int, clip_each: bool) -> dict[str, Any]:
    """Compile-time constants of `advance_kernel`: few rows a program where each row sums its own partials."""
    return {
        "ALGORITHM": algorithm,
        "NORM": norm_kind,
        "CLIP_EACH": clip_each,
        "ROWS": 4 if clip_each else 128,
        "WIDTH": 128 if clip_each else 1024,
    }


def norm_constants(grad_dtype: str, norm_kind: int) -> dict[str, Any]:
    """Compile-time constants of `norm_kernel`."""
    return {"GRAD_DTYPE": grad_dtype, "NORM": norm_kind}


def update_options(config: LaunchConfig) -> dict[str, Any]:
    """Compiler options of `update_kernel`."""
    return {"num_warps": config.n_warps, "num_stages": config.n_stages, **COMPILE_OPTIONS}


def reduction_options(warp_size: int = 32) -> dict[str, Any]:
    """Compiler options of `norm_kernel` and `advance_kernel`."""
    return {"num_warps": REDUCTION_THREADS // warp_size, **COMPILE_OPTIONS}


def launch_update(
    spec: Spec,
    config: LaunchConfig,
    n_chunks: int,
    n_processors: int,
    warp_size: int,
    chunks: Any,
    tensors: Any,
    grads: Any,
    scalars: Any,
    grad_scale: Any = None,
) -> None:
    """Launch `update_kernel` on the chunks of a spec.

    Args:
        spec: what is compiled in.
        config: how it is launched; the chunks are cut to its size.
        n_chunks: chunks in the table; at least 1.
        n_processors: multiprocessors of the device, for a persistent grid.
        warp_size: threads of a warp.
        chunks: the table of the spec's chunks.
        tensors: the table of the device's tensors.
        grads: the table of their gradients.
        scalars: what `launch_advance` wrote.
        grad_scale: fp32 [1], what the gradients that stay behind are divided by; None to leave them as they are.
    """
    n_programs = min(n_chunks, config.programs_per_processor * n_processors) or n_chunks
    update_kernel[(n_programs,)](
        chunks,
        tensors,
        grads,
        scalars,
        grad_scale,
        **update_constants(spec, config, warp_size),
        **update_options(config),
    )


def launch_advance(
    algorithm: str, norm_kind: int, clip_each: bool, n_tensors: int, *tables: Any, warp_size: int = 32
) -> None:
    """Launch `advance_kernel` once for all tensors of a device.

    Args:
        algorithm: "adam" or "sgd"; for "accumulate" one launch serves all later updates.
        norm_kind: NO_NORM, L2_NORM or INF_NORM: which partials of `norm_kernel` are there.
        clip_each: clip each gradient by its own L2 norm.
        n_tensors: rows of the tensor table.
        tables: counts, tensors, groups, sources, scalars, partials, grad_scale, found_inf, status.
        warp_size: threads of a warp.
    """
    constants = advance_constants(algorithm, norm_kind, clip_each)
    grid = (-(-n_tensors // constants["ROWS"]),)
    advance_kernel[grid](*tables, **constants, **reduction_options(warp_size))


def launch_norm(
    grad_dtype: str,
    norm_kind: int,
    n_spans: int,
    spans: Any,
    tensors: Any,
    grads: Any,
    groups: Any,
    partials: Any,
    warp_size: int = 32,
) -> None:
    """Launch `norm_kernel` on the spans of all gradients of a dtype; there must be at least one."""
    norm_kernel[(n_spans,)](
        spans,
        tensors,
        grads,
        groups,
        partials,
        **norm_constants(grad_dtype, norm_kind),
        **reduction_options(warp_size),
    )
