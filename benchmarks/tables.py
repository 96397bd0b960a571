"""Records as rows: what one table of a case shows, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from benchmarks.contenders import TORCH_FUSED
from benchmarks.host import KEPT, REFERENCE
from benchmarks.records import SKIPPED, TIMED, Record
from dragon.vm.measuring.timer import Spread

HEADINGS = (
    "contender",
    "ms a step",
    "20th-80th",
    "warm ms",
    "host ms",
    "device ms",
    "ratio",
    "B/param",
    "GB/s",
    "of copy_",
)

HOST_HEADINGS = ("contender", "us, 10 tensors", "ratio", "us, 1000 tensors", "ratio", "us a tensor")
RIVAL_HEADINGS = ("case", "ours", "ms a step", "fastest other of equal formats", "ms a step", "times as fast")

# (case, dtype) of one run.
Key = tuple[str, str]


class Rows(NamedTuple):
    """One table: `title`, a row of cells for each contender that was timed, and why the others were not."""

    title: str
    rows: list[tuple[str, ...]]
    absent: list[tuple[str, str]]


def by_case(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """Records of each case and dtype, in order of first appearance."""
    found: dict[Key, list[Record]] = {}
    for record in records:
        found.setdefault((record.case, record.precision), []).append(record)
    return found


def rows_of(records: Sequence[Record]) -> Rows:
    """The table of one case."""
    timed = [record for record in records if record.status == TIMED]
    absent = [
        (
            record.contender,
            ("" if record.status == SKIPPED else f"{record.status.upper()}: ") + (record.reason or ""),
        )
        for record in records
        if record.status != TIMED
    ]
    return Rows(_title(timed[0] if timed else records[0]), [_row(record) for record in timed], absent)


def _title(record: Record) -> str:
    parts = [f"{record.case}, {record.precision}"]
    if record.n_layers < record.n_layers_of_model:
        parts.append(f"{record.n_layers} of {record.n_layers_of_model} layers")
    if record.numel:
        parts.append(f"{record.n_tensors:,} tensors, {record.numel:,} parameters")
    return ": ".join((parts[0], ", ".join(parts[1:]))) if parts[1:] else parts[0]


def _row(record: Record) -> tuple[str, ...]:
    step = record.cold_ms
    return (
        record.contender,
        figure(step and step.median),
        f"{figure(step.p20)}-{figure(step.p80)}" if step else "",
        figure(record.warm_ms and record.warm_ms.median),
        figure(record.host_ms and record.host_ms.median),
        figure(record.device_ms and record.device_ms.median),
        _ratio(record.ratio),
        figure(record.nbytes_per_param),
        figure(record.gb_per_s),
        f"{record.share_of_copy:.1%}" if record.share_of_copy is not None else "",
    )


def _ratio(ratio: Spread | None) -> str:
    return f"{ratio.median:.2f}" if ratio else ""


def figure(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def is_host_work(record: Record) -> bool:
    """Whether the record is of host work alone; see `benchmarks.host`."""
    return record.reference == REFERENCE


def host_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Host work by contender, with few tensors and with many, and what each further tensor adds.

    Contenders stand there once more for gradients that stay where they are.
    """
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.status == TIMED and is_host_work(record):
            kept = f", {KEPT}" if record.case.endswith(KEPT) else ""
            found.setdefault(record.contender + kept, {})[record.n_tensors] = record
    rows: list[tuple[str, ...]] = []
    for contender, by_count in found.items():
        few, many = by_count[min(by_count)], by_count[max(by_count)]
        if few is not many and few.host_ms and many.host_ms:
            first, last = (1000 * times.median for times in (few.host_ms, many.host_ms))
            each = (last - first) / (many.n_tensors - few.n_tensors)
            ratios = _ratio(few.ratio), _ratio(many.ratio)
            rows.append((contender, figure(first), ratios[0], figure(last), ratios[1], f"{each:.3f}"))
    return rows


def rival_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Our default backend beside the fastest other optimizer with states of equal size, case by case.

    Each is compared with torch's fused Adam in its own turns.
    """
    rows: list[tuple[str, ...]] = []
    for ours in records:
        if ours.contender not in ("ours native", "ours triton") or ours.ratio is None:
            continue
        others = [
            (record.ratio.median, record)
            for record in records
            if (record.case, record.precision, record.reference) == (ours.case, ours.precision, TORCH_FUSED)
            and record.state_nbytes == ours.state_nbytes
            and record.ratio is not None
            and not record.is_ours
        ]
        if others:
            ratio, other = max(others, key=lambda pair: pair[0])
            times = [figure(record.cold_ms and record.cold_ms.median) for record in (ours, other)]
            speedup = f"{ours.ratio.median / ratio:.2f}"
            name = f"{ours.case}, {ours.precision}"
            rows.append((name, ours.contender, times[0], other.contender, times[1], speedup))
    return rows


def for_terminal(records: Sequence[Record], width: int) -> list[Table]:
    """A table for each case, narrower on a narrow terminal, and one of what was not timed."""
    tables = []
    why_not: dict[str, dict[str, None]] = {}
    for found in by_case([record for record in records if not is_host_work(record)]).values():
        content = rows_of(found)
        for contender, reason in content.absent:
            why_not.setdefault(reason, {})[contender] = None
        if content.rows:
            tables.append(_terminal_table(content, width))
    absent = [(", ".join(contenders), reason) for reason, contenders in why_not.items()]
    if rows := host_rows(records):
        tables.append(_plain_table("host work", HOST_HEADINGS, rows))
    if absent:
        tables.append(_plain_table("not timed", ("contenders", "because"), absent))
    return tables


def _plain_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _terminal_table(content: Rows, width: int) -> Table:
    has_device = any(row[HEADINGS.index("device ms")] for row in content.rows)
    hidden = set() if has_device else {"host ms", "device ms"}
    if width < 100:
        hidden |= {"20th-80th", "warm ms"}
    used = [i for i, name in enumerate(HEADINGS) if name not in hidden and any(row[i] for row in content.rows)]
    table = Table(title=content.title)
    for i in used:
        table.add_column(HEADINGS[i], justify="right" if i else "left", no_wrap=True)
    for row in content.rows:
        table.add_row(*(row[i] for i in used))
    return table
