"""What the compiler makes of every kernel, for GPUs that need not be there: ``python -m dragon.kernels.inspect``.

The constants and options are those of `dragon.kernels.launch`, so that what is inspected is what is launched.
`compile_update` judges a single candidate configuration, as a tuner does before it measures any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dragon.kernels import formats, norm, tile, update
from dragon.kernels.advance import advance_kernel
from dragon.kernels.archs import ARCHS, warp_size
from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.inspect.assembly import Lines, accesses_by_path, calls_in, lines_of, loads_in
from dragon.kernels.inspect.compile import Compiled, compile_kernel, scratch_cache
from dragon.kernels.inspect.machine_code import late_loads
from dragon.kernels.inspect.report import PATHS, Report, format_table
from dragon.kernels.inspect.variants import ADVANCES, MODES, NORMS, UNSCALES, UPDATES
from dragon.kernels.launch import REDUCTION_THREADS, reduction_options, update_constants, update_options
from dragon.kernels.spec import Spec

__all__ = [
    "ADVANCES",
    "ARCHS",
    "MODES",
    "NORMS",
    "PATHS",
    "UNSCALES",
    "UPDATES",
    "Report",
    "compile_update",
    "format_table",
    "inspect_kernels",
]

# These functions read tables; all other accesses on a path are to tensors.
TABLE_READERS = (tile.load_pair, tile.load_four, tile.load_tensors, tile.load_scale)


def _report(
    name: str,
    compiled: Compiled,
    paths: Mapping[str, Lines] | None = None,
    config: LaunchConfig | None = None,
    elements: float | None = None,
) -> Report:
    readers = [lines_of(function) for function in TABLE_READERS]
    return Report(
        kernel=name,
        arch=compiled.arch,
        config=config,
        registers=compiled.registers,
        spilled_nbytes=compiled.spilled_nbytes,
        shared_nbytes=compiled.shared_nbytes,
        arguments=compiled.arguments,
        paths=accesses_by_path(compiled.assembly, paths or {}, readers),
        elements=elements,
        table_loads=loads_in(compiled.assembly, readers) if config else None,
        late_loads=late_loads(compiled.machine_code, lines_of(formats.load_tile)) if config else None,
    )


def _update(
    name: str, spec: Spec, config: LaunchConfig, arch: str, *, unscales: bool = False
) -> tuple[Report, Compiled]:
    constants = update_constants(spec, config, warp_size(arch))
    if not unscales:
        constants["grad_scale_ptr"] = None
    compiled = compile_kernel(update.update_kernel, constants, update_options(config), arch)
    calls = calls_in(update.update_chunk, update.update_tile.__name__)
    paths = dict(zip(("tail", "vector", "misaligned"), calls, strict=True))
    elements = config.chunk / (config.n_warps * warp_size(arch))
    return _report(name, compiled, paths, config, elements), compiled


def _norm(name: str, constants: Mapping[str, Any], arch: str) -> tuple[Report, Compiled]:
    compiled = compile_kernel(norm.norm_kernel, constants, reduction_options(warp_size(arch)), arch)
    paths = dict(
        zip(("vector", "misaligned"), calls_in(norm.norm_kernel, norm.take_tiles.__name__), strict=True),
        tail=lines_of(norm.take_rest),
    )
    elements = norm.TILES_IN_FLIGHT.value * norm.TILE.value / REDUCTION_THREADS
    return _report(name, compiled, paths, elements=elements), compiled


def compile_update(spec: Spec, config: LaunchConfig, arch: str) -> Report:
    """Compile an update kernel for an architecture and report on it.

    Args:
        spec: which kernel, for which formats.
        config: how it would be launched.
        arch: as in "sm_90" or "gfx942".

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
        ValueError: for an unknown architecture.
    """
    with scratch_cache():
        return _update(str(spec), spec, config, arch)[0]


def _compile_all(archs: Sequence[str], is_wanted: Callable[[str], bool]) -> Iterator[tuple[Report, Compiled]]:
    for arch in archs:
        for name, spec in {**UPDATES, **MODES}.items():
            if is_wanted(name):
                yield _update(name, spec, default_config(arch, spec), arch)
        for name, spec in UNSCALES.items():
            if is_wanted(name):
                yield _update(name, spec, default_config(arch, spec), arch, unscales=True)
        for name, constants in NORMS.items():
            if is_wanted(name):
                yield _norm(name, constants, arch)
        for name, constants in ADVANCES.items():
            if is_wanted(name):
                compiled = compile_kernel(advance_kernel, constants, reduction_options(warp_size(arch)), arch)
                yield _report(name, compiled), compiled


def inspect_kernels(
    archs: Sequence[str] = ARCHS, texts: Sequence[str] = (), dump: Path | None = None
) -> list[Report]:
    """Compile every kernel in its default configuration, and report.

    Args:
        archs: architectures, as in "sm_90" or "gfx942".
        texts: only kernels with one of these in their name; by default all.
        dump: a folder for the assembly and machine code of each kernel.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
        ValueError: for an unknown architecture, or a text that no kernel has in its name.
    """
    names = [*UPDATES, *MODES, *UNSCALES, *NORMS, *ADVANCES]
    for text in texts:
        if not any(text in name for name in names):
            raise ValueError(f"no kernel has {text!r} in its name; there are {', '.join(names)}")

    def is_wanted(name: str) -> bool:
        return not texts or any(text in name for text in texts)

    reports = []
    with scratch_cache():
        for report, compiled in _compile_all(archs, is_wanted):
            reports.append(report)
            if dump is not None:
                _dump(dump, report, compiled)
    return reports


def _dump(folder: Path, report: Report, compiled: Compiled) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stage, content in compiled.asm.items():
        if stage in ("ttir", "ttgir", "ptx", "cubin", "amdgcn", "hsaco"):
            path = folder / f"{report.kernel.replace(' ', '_')}.{report.arch}.{stage}"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
