"""docs/performance.md: every figure on it comes from a line of benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.plots import Plot, draw, host_time, roofline
from benchmarks.records import SKIPPED, TIMED, Record
from benchmarks.tables import (
    HEADINGS,
    HOST_HEADINGS,
    TARGET_HEADINGS,
    by_case,
    figure,
    host_rows,
    rows_of,
    target_rows,
)
from benchmarks.targets import TARGETS, rivals

INTRODUCTION = """\
# Performance

<!-- Made by `python -m benchmarks report` from benchmarks/results; edit benchmarks/report.py instead. -->

Every figure on this page is computed from the JSON lines in `benchmarks/results`, which also say the driver, the
versions, the commit and the date. `make bench` measures the quick set on your machine.

In one process, contenders take turns, so that whatever else the machine does falls on all of them. Before that,
the first steps of each are held against `torch.optim.Adam` in float64 on elements of every tensor; a wrong one is
not timed. In the tables,

- *ms a step* is the median over the turns, with the 20th and 80th percentile beside it; a turn is as many steps as
  take torch's fused Adam 40 ms, behind one that does not count, or a single one where it takes more than 20;
- *cold* is the first step of a turn, when the caches are full of what others use, as after a backward pass;
- *host* is the time until the Python call returns, *device* the GPU's, with all launches queued before it starts;
- *ratio* is how many times as long torch's fused Adam took, turn by turn in one run: above 1 is faster;
- *B/param* is what a step moves for a parameter in the contender's formats, or would if it were fused;
- *GB/s* is that by device time, on a CPU by the time of the step, and *of copy_* compares it with a `copy_` of as
  many bytes in the same process. On a CPU that may be above 100%: a copy has to read the memory that it writes.

Where the memory does not hold all contenders of a case, they are measured in groups, each beside torch's fused
Adam: a ratio is to the torch of its own group, and compares contenders of two groups better than their times.

"triton-host" and "fused-host" are what remains of a step when its device does nothing: our kernels are replaced by
a function that returns at once, and so are the two operations behind torch's fused Adam. The ratio of one is to
the other.

The bounds are no optimizers. "bound operation" is torch's fused operation on lists made once, without any host
work, and "bound flat operation" the same on one flat tensor: no backend that calls it can be faster. "bound
addresses" asks each tensor for its gradient and its five addresses in Python, and does nothing else: our steps are
not bound by it, since they read the headers of all tensors at once (see [the design](design.md)).
"""

ABSENT = "Nothing has been measured yet.\n"


def write(records: Sequence[Record], page: Path) -> None:
    """Write the page and the pictures beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(records), encoding="utf-8")
    for plot in plots_of(records):
        draw(plot, page.parent / "images")


def render(records: Sequence[Record]) -> str:
    """The page's text."""
    devices = by_device(records)
    sections = [_device_section(name, latest(found)) for name, found in devices.items()]
    return "\n".join([INTRODUCTION, *(sections or [ABSENT])])


def plots_of(records: Sequence[Record]) -> list[Plot]:
    """The pictures of the page; those with nothing to show are left out."""
    found = []
    for name, of_device in by_device(records).items():
        current = latest(of_device)
        found += [roofline(current, f"roofline-{slug(name)}"), host_time(current, f"host-{slug(name)}")]
    return [plot for plot in found if plot.series]


def by_device(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each device; a CPU counts once for each number of threads."""
    found: dict[str, list[Record]] = {}
    for record in records:
        about = record.environment
        name = about["device"]
        if about["device_type"] == "cpu":
            name += f", {about['n_threads']} thread{'s' * (about['n_threads'] != 1)}"
        found.setdefault(name, []).append(record)
    return found


def latest(records: Sequence[Record]) -> list[Record]:
    """Of each case the records of its last run in which something was timed, in the order of `CASES`."""
    order = {name: index for index, name in enumerate(CASES)}
    newest: list[Record] = []
    for found in by_case(records).values():
        runs = [record.environment["run"] for record in found if record.status == TIMED]
        chosen = max(runs or [record.environment["run"] for record in found])
        newest += [record for record in found if record.environment["run"] == chosen]
    return sorted(newest, key=lambda record: order.get(record.case, len(order)))


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _device_section(name: str, records: list[Record]) -> str:
    device_type = records[0].environment["device_type"]
    parts = [f"## {name}\n", _origin(records), _targets(records, device_type), _rivals(records, device_type)]
    parts.append(_host_work(records))
    never = _never_timed(records)
    for plot in plots_of(records):
        parts.append(f"![{plot.title}](images/{plot.name}.svg)\n")
    for found in by_case(records).values():
        parts.append(_case_section([record for record in found if record.contender not in never]))
    if never:
        parts += ["### Not timed in any case\n", _reasons(list(never.items()))]
    return "\n".join(part for part in parts if part)


def _never_timed(records: Sequence[Record]) -> dict[str, str]:
    """Contenders that are absent everywhere for one and the same reason."""
    reasons: dict[str, set[str | None]] = {}
    for record in records:
        reasons.setdefault(record.contender, set()).add(record.reason if record.status == SKIPPED else None)
    return {
        name: str(next(iter(found))) for name, found in reasons.items() if len(found) == 1 and None not in found
    }


def _reasons(absent: Sequence[tuple[str, str]]) -> str:
    """A list of reasons with the contenders that each concerns."""
    names: dict[str, list[str]] = {}
    for contender, reason in absent:
        names.setdefault(reason, []).append(contender)
    return "\n".join(f"- {', '.join(found)}: {reason}" for reason, found in names.items()) + "\n"


def _origin(records: Sequence[Record]) -> str:
    """Which runs the section is made of."""
    lines = []
    for run in sorted({record.environment["run"] for record in records}):
        record = next(record for record in records if record.environment["run"] == run)
        about = record.environment
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        driver = f", driver {about['driver']}" if about["driver"] else ""
        lines.append(f"- {about['date']}, commit {about['commit']}{driver}: {versions}")
    notes = sorted({f"\n**{record.note}**\n" for record in records if record.note})
    return "\n".join([*lines, *notes]) + "\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)) + "\n"


def _targets(records: Sequence[Record], device_type: str) -> str:
    if not any(target.device_type == device_type for target in TARGETS):
        return ""
    return "### Targets\n\n" + _table(TARGET_HEADINGS, target_rows(records, device_type), left=3)


def _rivals(records: Sequence[Record], device_type: str) -> str:
    rows = [
        (
            f"{rival.ours.case}, {rival.ours.precision}",
            rival.ours.contender,
            figure(rival.ours.total_ms and rival.ours.total_ms.median),
            rival.other.contender,
            figure(rival.other.total_ms and rival.other.total_ms.median),
            f"{rival.speedup:.2f}",
        )
        for rival in rivals(records, device_type)
    ]
    if not rows:
        return ""
    headings = ("case", "ours", "ms a step", "fastest other", "ms a step", "times as fast")
    return "### Against the fastest other\n\n" + _table(headings, rows)


def _host_work(records: Sequence[Record]) -> str:
    rows = host_rows(records)
    return "### Host work\n\n" + _table(HOST_HEADINGS, rows) if rows else ""


def _case_section(records: Sequence[Record]) -> str:
    if not records:
        return ""
    content = rows_of(records)
    parts = [f"### {content.title}\n"]
    if content.rows:
        parts.append(_table(HEADINGS, content.rows))
    if content.absent:
        parts += ["Not timed:\n", _reasons(content.absent)]
    return "\n".join(parts)
