"""What one kernel became on one architecture, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect.assembly import Accesses

PATHS = ("vector", "tail", "misaligned")


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
        elements: elements that a thread handles in one pass of the vector path; None for a kernel without paths.
        table_loads: load instructions that read tables; None for a kernel that only touches tables.
        late_loads: tile loads of 16 bytes that the machine code issues after it first used another one's data;
            None where it is not known.
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
    table_loads: int | None
    late_loads: int | None

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


def _widths(counts: Mapping[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(counts.items(), reverse=True)) or "-"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def format_table(reports: Sequence[Report]) -> str:
    """A table of reports; accesses are written as count x bytes, per thread and pass."""
    header: tuple[str, ...] = (
        *("kernel", "arch", "vector loads", "stores", "tail", "misaligned"),
        *("B/elem", "instr/elem", "table loads", "late", "regs", "spill B", "shared B"),
    )
    rows = [header]
    for report in reports:
        vector, tail, misaligned = (report.paths.get(name, Accesses({}, {}, 0)) for name in PATHS)
        rows.append(
            (
                *(report.kernel, report.arch, _widths(vector.loads), _widths(vector.stores)),
                *(_widths(tail.loads), _widths(misaligned.loads)),
                *(_figure(report.nbytes_per_element), _figure(report.instructions_per_element)),
                *(_figure(report.table_loads), _figure(report.late_loads)),
                *map(str, (report.registers, report.spilled_nbytes, report.shared_nbytes)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
