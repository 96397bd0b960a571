"""Launch the kernels: grids, compile-time constants and options, in one place."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any

import triton

from dragon.kernels.advance import advance_kernel
from dragon.kernels.config import LaunchConfig
from dragon.kernels.norm import L2_NORM, norm_kernel
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

# Sets of tables that a launcher remembers. A step has one; a loss scaler's tensors may lie elsewhere at each step.
MOST_READY = 16

_data_ptr, _dtype_of = methodcaller("data_ptr"), attrgetter("dtype")


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


def norm_constants(grad_dtype: str, norm_kind: int, sum_dtype: str = "float64") -> dict[str, Any]:
    """Compile-time constants of `norm_kernel`: squares of float64 gradients are summed in float64 everywhere."""
    if norm_kind != L2_NORM.value or grad_dtype == "float64":
        sum_dtype = "float64"
    return {"GRAD_DTYPE": grad_dtype, "NORM": norm_kind, "SUM_DTYPE": sum_dtype}


def update_options(config: LaunchConfig) -> dict[str, Any]:
    """Compiler options of `update_kernel`."""
    return {"num_warps": config.n_warps, "num_stages": config.n_stages, **COMPILE_OPTIONS}


def reduction_options(warp_size: int = 32) -> dict[str, Any]:
    """Compiler options of `norm_kernel` and `advance_kernel`."""
    return {"num_warps": REDUCTION_THREADS // warp_size, **COMPILE_OPTIONS}


class Launcher:
    """Launches one kernel again and again, on one device, with the same grid, constants and options.

    At each launch triton looks a kernel's code up by the text of all its arguments, which takes longer than the
    launch. A launcher has it looked up once for the same tables.

    Args:
        name: of the kernel, for those who count launches.
        kernel: a function of triton's.
        n_programs: of the grid.
        constants: compile-time constants, in the order of the kernel's last parameters.
        options: of the compiler.
    """

    def __init__(
        self, name: str, kernel: Any, n_programs: int, constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.name = name
        self._kernel, self._grid = kernel, (n_programs, 1, 1)
        self._constants, self._options = constants, options
        self._values = tuple(constants.values())
        self._ready: dict[tuple[Any, ...], Callable[..., Any]] = {}
        # Whether the last table was given, in what is compiled by now.
        self._compiled: set[bool] = set()

    def compile(self, *tables: Any) -> None:
        """Compile what a launch on tables like these needs, in seconds, and launch nothing."""
        has_last = tables[-1] is not None
        if has_last not in self._compiled:
            self._kernel.warmup(*tables, grid=self._grid, **self._constants, **self._options)
            self._compiled.add(has_last)

    def __call__(self, *tables: Any) -> None:
        """Launch on the current stream.

        Args:
            tables: tensors on the device, in the order of the kernel's first parameters; the last may be None.
        """
        given = tables if tables[-1] is not None else tables[:-1]
        addresses = tuple(map(_data_ptr, given))
        # Triton compiles code of its own for each alignment and dtype of a table.
        key = (addresses, *map(_dtype_of, given))
        run = self._ready.get(key)
        if run is not None:
            # For a tensor triton would ask the driver where it is, as it did at the first launch.
            run(*addresses, *tables[len(given) :], *self._values)
            return
        code = self._kernel[self._grid](*tables, **self._constants, **self._options)
        # The interpreter has none.
        if code is not None:
            if len(self._ready) >= MOST_READY:
                self._ready.clear()
            self._ready[key] = code[self._grid]


def update_launcher(
    spec: Spec, config: LaunchConfig, n_chunks: int, n_processors: int, warp_size: int = 32
) -> Launcher:
    """Launches `update_kernel` on the chunks of a spec.

    Args:
        spec: what is compiled in.
        config: how it is launched; the chunks are cut to its size.
        n_chunks: chunks in the table; at least 1.
        n_processors: multiprocessors of the device, for a persistent grid.
        warp_size: threads of a warp.

    Returns:
        What takes the tables: the spec's chunks, tensors, grads, and the scalars of `advance_kernel`. Then fp32
        [1], what the gradients that stay behind are divided by, or None to leave them as they are.
    """
    n_programs = min(n_chunks, config.programs_per_processor * n_processors) or n_chunks
    constants = update_constants(spec, config, warp_size)
    return Launcher("update", update_kernel, n_programs, constants, update_options(config))


def advance_launcher(
    algorithm: str, norm_kind: int, clip_each: bool, n_tensors: int, warp_size: int = 32
) -> Launcher:
    """Launches `advance_kernel` once for all tensors of a device.

    Args:
        algorithm: "adam" or "sgd"; for "accumulate" one launch serves all later updates.
        norm_kind: NO_NORM, L2_NORM or INF_NORM: which partials of `norm_kernel` are there.
        clip_each: clip each gradient by its own L2 norm.
        n_tensors: rows of the tensor table.
        warp_size: threads of a warp.

    Returns:
        What takes the tables: counts, tensors, grads, groups, sources, scalars, partials, grad_scale, found_inf,
        status.
    """
    constants = advance_constants(algorithm, norm_kind, clip_each)
    n_programs = -(-n_tensors // constants["ROWS"])
    return Launcher("advance", advance_kernel, n_programs, constants, reduction_options(warp_size))


def norm_launcher(
    grad_dtype: str, norm_kind: int, n_spans: int, warp_size: int = 32, sum_dtype: str = "float64"
) -> Launcher:
    """Launches `norm_kernel` on the spans of all gradients of a dtype.

    Args:
        grad_dtype: of the gradients.
        norm_kind: L2_NORM or INF_NORM.
        n_spans: spans in the table; at least 1.
        warp_size: threads of a warp.
        sum_dtype: "float64", or "float32" to sum squares so where they fit: see `dragon.kernels.archs.sum_dtype`.

    Returns:
        What takes the tables: the dtype's spans, tensors, grads, groups, partials.
    """
    constants = norm_constants(grad_dtype, norm_kind, sum_dtype)
    return Launcher("norm", norm_kernel, n_spans, constants, reduction_options(warp_size))
