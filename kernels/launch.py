"""Launch the kernels: grids, compile-time constants and options, in one place."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dragon.kernels.accumulate import accumulate_kernel
from dragon.kernels.adam import adam_kernel
from dragon.kernels.advance import advance_kernel
from dragon.kernels.config import LaunchConfig
from dragon.kernels.norm import norm_kernel
from dragon.kernels.sgd import sgd_kernel

UPDATE_KERNELS: dict[str, Any] = {"adam": adam_kernel, "sgd": sgd_kernel, "accumulate": accumulate_kernel}

# Whether kernels run in triton's interpreter, which takes tensors of any device.
INTERPRETED = not isinstance(adam_kernel, triton.runtime.JITFunction)

DTYPES: dict[str, tl.dtype] = {
    "float64": tl.float64,
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
}

# Contraction into fused multiply-adds is left off: it is not the same on the aligned and the misaligned path, and
# the result must not depend on the path. The kernels are bound by memory, so it costs nothing.
COMPILE_OPTIONS = {"enable_fp_fusion": False}

# Threads of a program of `norm_kernel` and of `advance_kernel`, which are not tuned. More of them would read less
# than 16 bytes each of a tile of bf16.
REDUCTION_THREADS = 128


class Variant(NamedTuple):
    """What is compiled into an update kernel. Dtypes are names, as in "float32".

    Attributes:
        algorithm: a key of `UPDATE_KERNELS`.
        n_states: state tensors a parameter.
        param_dtype, grad_dtype, state_dtype: of the tensors.
        average: keep an exponential moving average of the parameters.
        zero_grad: set the gradients to zero on the way.
    """

    algorithm: str
    n_states: int
    param_dtype: str
    grad_dtype: str
    state_dtype: str
    average: bool = False
    zero_grad: bool = False


def update_constants(variant: Variant, config: LaunchConfig, warp_size: int = 32) -> dict[str, Any]:
    """Compile-time constants of an update kernel: fp64 maths for fp64 parameters, else fp32."""
    return {
        "N_STATES": variant.n_states,
        "PARAM_DTYPE": DTYPES[variant.param_dtype],
        "GRAD_DTYPE": DTYPES[variant.grad_dtype],
        "STATE_DTYPE": DTYPES[variant.state_dtype],
        "COMPUTE_DTYPE": tl.float64 if variant.param_dtype == "float64" else tl.float32,
        "AVERAGE": variant.average,
        "ZERO_GRAD": variant.zero_grad,
        "EVICTION": config.eviction,
        "CHUNK": config.chunk,
        "N_THREADS": config.n_warps * warp_size,
        "PERSISTENT": config.programs_per_processor > 0,
    }


def advance_constants(algorithm: str, norm: int, clip_each: bool) -> dict[str, Any]:
    """Compile-time constants of `advance_kernel`: few rows a program where each row sums its own partials."""
    return {
        "IS_ADAM": algorithm == "adam",
        "NORM": norm,
        "CLIP_EACH": clip_each,
        "ROWS": 4 if clip_each else 128,
        "WIDTH": 128 if clip_each else 1024,
    }


def norm_constants(grad_dtype: str, norm: int) -> dict[str, Any]:
    """Compile-time constants of `norm_kernel`."""
    return {"GRAD_DTYPE": DTYPES[grad_dtype], "NORM": norm}


def update_options(config: LaunchConfig) -> dict[str, Any]:
    """Compiler options of an update kernel."""
    return {"num_warps": config.n_warps, "num_stages": config.n_stages, **COMPILE_OPTIONS}


def reduction_options(warp_size: int = 32) -> dict[str, Any]:
    """Compiler options of `norm_kernel` and `advance_kernel`."""
    return {"num_warps": REDUCTION_THREADS // warp_size, **COMPILE_OPTIONS}


def launch_update(
    variant: Variant,
    config: LaunchConfig,
    n_chunks: int,
    n_processors: int,
    warp_size: int,
    *pointers: Any,
) -> None:
    """Launch an update kernel on its pointers: counts, chunks, tensors, scalars."""
    n_programs = min(n_chunks, config.programs_per_processor * n_processors) or n_chunks
    UPDATE_KERNELS[variant.algorithm][(n_programs,)](
        *pointers,
        **update_constants(variant, config, warp_size),
        **update_options(config),
    )


def launch_advance(
    algorithm: str, norm: int, clip_each: bool, n_tensors: int, *pointers: Any, warp_size: int = 32
) -> None:
    """Launch `advance_kernel` on its pointers."""
    constants = advance_constants(algorithm, norm, clip_each)
    grid = (-(-n_tensors // constants["ROWS"]),)
    advance_kernel[grid](*pointers, **constants, **reduction_options(warp_size))


def launch_norm(grad_dtype: str, norm: int, n_partials: int, *pointers: Any, warp_size: int = 32) -> None:
    """Launch `norm_kernel` on its pointers: spans, tensors, groups, partials."""
    norm_kernel[(n_partials,)](*pointers, **norm_constants(grad_dtype, norm), **reduction_options(warp_size))
