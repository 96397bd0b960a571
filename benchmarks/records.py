"""One JSON line a measurement, in files that are only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Spread

TIMED, SKIPPED, WRONG = "timed", "skipped", "wrong"


@dataclass(frozen=True)
class Record:
    """A contender in a case, or why it is not there.

    Attributes:
        case, precision, contender: what was measured.
        status: `TIMED`, `SKIPPED` or `WRONG`.
        environment: see `benchmarks.environment.describe`.
        reason: why it was not timed.
        note: what a reader must know about the whole run.
        n_tensors, n_groups, numel: of the case, as it was measured.
        n_layers, n_layers_of_model: of a model; less of them where memory did not suffice.
        chain, new_grads: of the case.
        nbytes_per_param: bytes that a step moves for a parameter.
        error: largest error of a parameter in learning rates a step, beyond its own rounding.
        total_ms, host_ms, device_ms, cold_ms: a step; see `benchmarks.timing.Turn`.
        reference: what the ratio is to.
        ratio: how many times as long the reference took, turn by turn.
        gb_per_s: bytes moved by device time, or by total time on the CPU.
        share_of_copy: of the bandwidth of `copy_` in the same process.
        n_launches: kernels launched or operations called a step, where they were counted.
    """

    case: str
    precision: str
    contender: str
    status: str
    environment: dict[str, Any]
    reason: str | None = None
    note: str | None = None
    n_tensors: int = 0
    n_groups: int = 0
    numel: int = 0
    n_layers: int = 0
    n_layers_of_model: int = 0
    chain: bool = False
    new_grads: bool = False
    nbytes_per_param: float | None = None
    error: float | None = None
    total_ms: Spread | None = None
    host_ms: Spread | None = None
    device_ms: Spread | None = None
    cold_ms: Spread | None = None
    reference: str | None = None
    ratio: Spread | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    n_launches: float | None = None

    @property
    def step_ms(self) -> Spread | None:
        """What a step takes: in total, or the host's part where nothing else was measured."""
        return self.total_ms or self.host_ms

    def as_line(self) -> str:
        """The record as one line of JSON; spreads become objects, and numbers keep 5 digits."""
        return json.dumps({name: _plain(value) for name, value in asdict(self).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return {name: _plain(number) for name, number in zip(Spread._fields, value, strict=True)}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def from_line(line: str) -> Record:
    """Read what `Record.as_line` wrote.

    Raises:
        TypeError: for a line with other fields.
    """
    fields = json.loads(line)
    for name in ("total_ms", "host_ms", "device_ms", "cold_ms", "ratio"):
        if fields.get(name) is not None:
            fields[name] = Spread(**fields[name])
    return Record(**fields)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, and make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(record.as_line() + "\n")


def read(folder: Path) -> list[Record]:
    """All records of a folder's ``*.jsonl``, or of one such file."""
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
    return [
        from_line(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
