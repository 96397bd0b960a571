"""Records as rows: what one table of a case shows, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.records import SKIPPED, TIMED, Record
from benchmarks.targets import verdicts
from benchmarks.timing import Spread

HEADINGS = (
    "contender",
    "ms a step",
    "20th-80th",
    "cold ms",
    "host ms",
    "device ms",
    "ratio",
    "B/param",
    "GB/s",
    "of copy_",
)

HOST_HEADINGS = ("contender", "us a tensor", "fixed us", "us for 1000 tensors")
TARGET_HEADINGS = ("case", "contender", "target", "measured", "met")

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
        (record.contender, ("" if record.status == SKIPPED else "WRONG: ") + (record.reason or ""))
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
    step = record.step_ms
    return (
        record.contender,
        figure(step and step.median),
        f"{figure(step.p20)}-{figure(step.p80)}" if step else "",
        figure(record.cold_ms and record.cold_ms.median),
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


def host_series(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """The host's microseconds of a step over the number of tensors, by contender, in the cases made for it."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        case = CASES.get(record.case)
        if record.status == TIMED and record.host_ms and case and case.for_host and not case.new_grads:
            series.setdefault(record.contender, []).append((record.n_tensors, 1000 * record.host_ms.median))
    return {name: sorted(points) for name, points in series.items()}


def host_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Host work as a part for each tensor and a fixed part, from the smallest case and that of 1000 tensors."""
    rows: list[tuple[str, ...]] = []
    for contender, points in host_series(records).items():
        few, many = points[0], max(point for point in points if point[0] <= 1000)
        if few[0] < many[0]:
            each = (many[1] - few[1]) / (many[0] - few[0])
            rows.append((contender, f"{each:.3f}", f"{few[1] - each * few[0]:.1f}", figure(many[1])))
    return rows


def target_rows(records: Sequence[Record], device_type: str) -> list[tuple[str, ...]]:
    """What was set out to be reached on a type of device, and what was measured."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    return [
        (
            f"{verdict.target.case}, {verdict.target.precision}",
            verdict.target.contender,
            verdict.target.text,
            figure(verdict.value),
            words[verdict.is_met],
        )
        for verdict in verdicts(records, device_type)
    ]


def for_terminal(records: Sequence[Record], width: int) -> list[Table]:
    """A table for each case, narrower on a narrow terminal, and one of what was not timed."""
    tables = []
    why_not: dict[str, dict[str, None]] = {}
    for found in by_case(records).values():
        content = rows_of(found)
        for contender, reason in content.absent:
            why_not.setdefault(reason, {})[contender] = None
        if content.rows:
            tables.append(_terminal_table(content, width))
    device_type = records[0].environment["device_type"]
    targets = [row for row in target_rows(records, device_type) if row[3]]
    absent = [(", ".join(contenders), reason) for reason, contenders in why_not.items()]
    if rows := host_rows(records):
        tables.append(_plain_table("host work", HOST_HEADINGS, rows))
    if targets:
        tables.append(_plain_table("targets", TARGET_HEADINGS, targets))
    if absent:
        tables.append(_plain_table("not timed", ("contenders", "because"), absent))
    return tables


def _plain_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table


def _terminal_table(content: Rows, width: int) -> Table:
    has_device = any(row[HEADINGS.index("device ms")] for row in content.rows)
    hidden = set() if has_device else {"host ms", "device ms"}
    if width < 100:
        hidden |= {"20th-80th", "cold ms"}
    used = [i for i, name in enumerate(HEADINGS) if name not in hidden and any(row[i] for row in content.rows)]
    table = Table(title=content.title)
    for i in used:
        table.add_column(HEADINGS[i], justify="right" if i else "left", no_wrap=True)
    for row in content.rows:
        table.add_row(*(row[i] for i in used))
    return table
