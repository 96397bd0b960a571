"""What the compiler makes of every kernel, for GPUs that need not be there: ``python -m dragon.kernels.inspect``.

The constants and options are those of `dragon.kernels.launch`, so that what is inspected is what is launched.
`compile_update` judges a single candidate configuration, as a tuner does before it measures any.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dragon.kernels import pointwise
from dragon.kernels._assembly import Accesses, accesses_by_path, calls_in, lines_of
from dragon.kernels._compile import Compiled, compile_kernel, parse_arch, scratch_cache
from dragon.kernels.advance import advance_kernel
from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.launch import (
    UPDATE_KERNELS,
    Variant,
    advance_constants,
    norm_constants,
    reduction_options,
    update_constants,
    update_options,
)
from dragon.kernels.norm import INF_NORM, L2_NORM, NO_NORM, norm_kernel

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
PATHS = ("vector", "tail", "misaligned")

FP32, BF16, FP16, FP64 = "float32", "bfloat16", "float16", "float64"

UPDATES: dict[str, Variant] = {
    "adam fp32": Variant("adam", 2, FP32, FP32, FP32),
    "adam fp32 amsgrad": Variant("adam", 3, FP32, FP32, FP32),
    "adam fp32 average": Variant("adam", 2, FP32, FP32, FP32, average=True),
    "adam fp32 zero_grad": Variant("adam", 2, FP32, FP32, FP32, zero_grad=True),
    "adam bf16": Variant("adam", 2, BF16, BF16, BF16),
    "adam bf16 fp32-state": Variant("adam", 2, BF16, BF16, FP32),
    "adam bf16 fp32-grad": Variant("adam", 2, BF16, FP32, BF16),
    "adam bf16 fp32-grad fp32-state": Variant("adam", 2, BF16, FP32, FP32),
    "adam fp16": Variant("adam", 2, FP16, FP16, FP16),
    "adam fp64": Variant("adam", 2, FP64, FP64, FP64),
    "sgd fp32": Variant("sgd", 0, FP32, FP32, FP32),
    "sgd fp32 momentum": Variant("sgd", 1, FP32, FP32, FP32),
    "sgd bf16 momentum": Variant("sgd", 1, BF16, BF16, BF16),
    "accumulate fp32": Variant("accumulate", 0, FP32, FP32, FP32),
    "accumulate fp32 bf16-grad": Variant("accumulate", 0, FP32, BF16, FP32),
}

NORMS = {
    f"norm {order} {dtype}": norm_constants(dtype, norm)
    for dtype in (FP32, BF16)
    for order, norm in (("L2", L2_NORM.value), ("inf", INF_NORM.value))
}

ADVANCES = {
    f"advance {algorithm}{label}": advance_constants(algorithm, norm.value, clip_each)
    for algorithm in ("adam", "sgd")
    for label, norm, clip_each in (
        ("", NO_NORM, False),
        (" norm", L2_NORM, False),
        (" inf-norm", INF_NORM, False),
        (" clip-each", NO_NORM, True),
        (" norm clip-each", L2_NORM, True),
    )
}


class Report(NamedTuple):
    """What one kernel became on one architecture.

    Attributes:
        kernel: what was compiled, in words.
        arch: as in "sm_90".
        config: how it is launched; None for a kernel that is not tuned.
        registers: vector registers a thread.
        spilled_nbytes: local memory a thread, which only spilled registers take.
        shared_nbytes: shared memory a program.
        arguments: types by name of what the compiled kernel takes at run time.
        paths: tensor accesses on each of `PATHS`; empty for a kernel that only touches tables. Instructions are
            those of PTX on NVIDIA, where a division is one, and machine instructions on AMD.
        elements: elements that a thread handles in one pass of the vector path, if the configuration tells.
    """

    kernel: str
    arch: str
    config: LaunchConfig | None
    registers: int
    spilled_nbytes: int
    shared_nbytes: int
    arguments: Mapping[str, str]
    paths: Mapping[str, Accesses]
    elements: float | None

    @property
    def is_vectorized(self) -> bool:
        """Whether every tensor access of the vector path is at least 16 bytes wide."""
        path = self.paths[PATHS[0]]
        widths = [*path.loads, *path.stores]
        return bool(widths) and min(widths) >= 16

    @property
    def nbytes_per_element(self) -> float | None:
        """Bytes that the vector path loads and stores for an element."""
        return self.paths[PATHS[0]].nbytes / self.elements if self.elements else None

    @property
    def instructions_per_element(self) -> float | None:
        """Instructions of the vector path for an element."""
        return self.paths[PATHS[0]].instructions / self.elements if self.elements else None

    def as_json(self) -> dict[str, Any]:
        """The report in plain types, properties included."""
        return {
            **self._asdict(),
            "config": self.config and vars(self.config),
            "paths": {name: path._asdict() for name, path in self.paths.items()},
            "is_vectorized": self.is_vectorized if self.paths else None,
            "nbytes_per_element": self.nbytes_per_element,
            "instructions_per_element": self.instructions_per_element,
        }


def _report(
    name: str,
    compiled: Compiled,
    calls: Sequence[Any] = (),
    config: LaunchConfig | None = None,
    elements: float | None = None,
) -> Report:
    readers = [lines_of(function) for function in (pointwise.address, pointwise.scalar)]
    paths = dict(zip(PATHS, calls, strict=True)) if calls else {}
    return Report(
        name,
        compiled.arch,
        config,
        compiled.registers,
        compiled.spilled_nbytes,
        compiled.shared_nbytes,
        compiled.arguments,
        accesses_by_path(compiled.assembly, paths, readers),
        elements,
    )


def arch_key(arch: str) -> str:
    """The key of `default_config` for an architecture: "90" for "sm_90", and "gfx942" as it is."""
    return arch.removeprefix("sm_")


def _update(name: str, variant: Variant, config: LaunchConfig, arch: str) -> tuple[Report, Compiled]:
    constants = update_constants(variant, config, parse_arch(arch).warp_size)
    compiled = compile_kernel(UPDATE_KERNELS[variant.algorithm], constants, update_options(config), arch)
    calls = calls_in(pointwise._update_chunk, pointwise._update_tile.__name__)
    return _report(name, compiled, calls, config, config.chunk / constants["N_THREADS"]), compiled


def compile_update(variant: Variant, config: LaunchConfig, arch: str) -> Report:
    """Compile an update kernel for an architecture and report on it.

    Args:
        variant: which kernel, for which dtypes.
        config: how it would be launched.
        arch: as in "sm_90" or "gfx942".

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
        ValueError: for an unknown architecture.
    """
    with scratch_cache():
        return _update(" ".join(map(str, variant)), variant, config, arch)[0]


def _compile_all(archs: Sequence[str], pattern: str) -> Iterator[tuple[Report, Compiled]]:
    norm_calls = calls_in(norm_kernel, "accumulate")
    for arch in archs:
        reduction = reduction_options(parse_arch(arch).warp_size)
        for name, variant in UPDATES.items():
            if pattern in name:
                yield _update(name, variant, default_config(arch_key(arch)), arch)
        for name, constants in NORMS.items():
            if pattern in name:
                compiled = compile_kernel(norm_kernel, constants, reduction, arch)
                yield _report(name, compiled, norm_calls), compiled
        for name, constants in ADVANCES.items():
            if pattern in name:
                compiled = compile_kernel(advance_kernel, constants, reduction, arch)
                yield _report(name, compiled), compiled


def inspect_kernels(archs: Sequence[str] = ARCHS, pattern: str = "", dump: Path | None = None) -> list[Report]:
    """Compile every kernel in its default configuration, and report.

    Args:
        archs: architectures, as in "sm_90" or "gfx942".
        pattern: only kernels with this in their name.
        dump: a folder for the assembly and machine code of each kernel.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
        ValueError: for an unknown architecture.
    """
    reports = []
    with scratch_cache():
        for report, compiled in _compile_all(archs, pattern):
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


def _widths(counts: Mapping[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(counts.items(), reverse=True)) or "-"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def format_table(reports: Sequence[Report]) -> str:
    """A table of reports; accesses are written as count x bytes, per thread and pass."""
    header: tuple[str, ...] = (
        *("kernel", "arch", "vector loads", "stores", "tail", "misaligned"),
        *("B/elem", "instr/elem", "regs", "spill B", "shared B"),
    )
    rows = [header]
    for report in reports:
        vector, tail, misaligned = (report.paths.get(name, Accesses({}, {}, 0)) for name in PATHS)
        rows.append(
            (
                *(report.kernel, report.arch, _widths(vector.loads), _widths(vector.stores)),
                *(_widths(tail.loads), _widths(misaligned.loads)),
                *(_figure(report.nbytes_per_element), _figure(report.instructions_per_element)),
                *map(str, (report.registers, report.spilled_nbytes, report.shared_nbytes)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the command line is described by ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m dragon.kernels.inspect", description=__doc__)
    parser.add_argument("--arch", action="append", help=f"may be repeated; by default {', '.join(ARCHS)}")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels with TEXT in their name")
    parser.add_argument("--json", action="store_true", help="a list of reports instead of a table")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write IR, assembly and machine code to DIR")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        # triton has read it by now, and there is nothing to compile in this process.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "dragon.kernels.inspect", *(arguments or sys.argv[1:])]
        return subprocess.run(command, env=environment).returncode
    try:
        reports = inspect_kernels(options.arch or ARCHS, options.kernel, options.dump)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps([report.as_json() for report in reports]) if options.json else format_table(reports))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
