"""One JSON line a measurement, in files that are only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dragon.vm.measuring.timer import Spread

TIMED, SKIPPED, WRONG, FAILED = "timed", "skipped", "wrong", "failed"

SPREADS = ("cold_ms", "warm_ms", "host_ms", "device_ms", "ratio")


@dataclass(frozen=True)
class Record:
    """A contender in a case, or why it is not there.

    Attributes:
        case, precision, contender: what was measured.
        status: `TIMED`, `SKIPPED`, `WRONG` or `FAILED`.
        environment: see `benchmarks.environment.describe`.
        reason: why it was not timed.
        note: what a reader must know about the whole run.
        n_tensors, n_groups, numel: of the case, as it was measured.
        n_layers, n_layers_of_model: of a model; less of them where memory did not suffice.
        chain: of the case.
        state_nbytes: bytes a parameter of the moments that the contender keeps.
        nbytes_per_param: bytes that a step moves for a parameter.
        error: largest error of a parameter in learning rates a step, beyond its own rounding.
        cold_ms, warm_ms, host_ms, device_ms: a step; see `benchmarks.timing.Turn` and `benchmarks.host`.
        reference: what the ratio is to.
        ratio: how many times as long the reference took, round by round.
        gb_per_s: bytes moved by device time, or by the time of a cold step on the CPU.
        share_of_copy: of the bandwidth of `copy_` in the same process.
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
    state_nbytes: float | None = None
    nbytes_per_param: float | None = None
    error: float | None = None
    cold_ms: Spread | None = None
    warm_ms: Spread | None = None
    host_ms: Spread | None = None
    device_ms: Spread | None = None
    reference: str | None = None
    ratio: Spread | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the contender is of this library."""
        return self.contender.startswith("ours")

    @property
    def is_defect(self) -> bool:
        """Whether a run with this record has failed: a wrong result, or one of ours that raised."""
        return self.status == WRONG or (self.status == FAILED and self.is_ours)

    @property
    def busy_ms(self) -> Spread | None:
        """What bandwidth is computed from: the device's time, or that of the step on a CPU."""
        return self.device_ms or self.cold_ms

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
        ValueError: for a line that is no JSON, or has other fields.
    """
    fields = json.loads(line)
    try:
        for name in SPREADS:
            if fields.get(name) is not None:
                fields[name] = Spread(**fields[name])
        return Record(**fields)
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error).removeprefix("Record.__init__() ")) from None


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, and make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record.as_line() + "\n" for record in records]
    # A killed process leaves a line without an end.
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        lines.insert(0, "\n")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read(folder: Path) -> list[Record]:
    """All records of a folder's ``*.jsonl``, or of one such file; a contender's last line in a run counts.

    A case writes what it has after its first rounds, for the event that it is killed, and again at its end.

    Raises:
        OSError: if a file cannot be read.
        ValueError: for a line that is no record.
    """
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
    found: dict[tuple[str, ...], Record] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            # The last line of a killed process may be cut off.
            if line.endswith("}"):
                try:
                    record = from_line(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                key = (record.environment["run"], record.case, record.precision, record.contender)
                found[key] = record
    return list(found.values())
