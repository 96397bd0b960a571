"""docs/performance.md: every figure on it comes from a line of benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.plots import Plot, draw, roofline, speeds
from benchmarks.probe import report as probe
from benchmarks.records import SKIPPED, TIMED, WRONG, Record
from benchmarks.tables import (
    HEADINGS,
    HOST_HEADINGS,
    RIVAL_HEADINGS,
    by_case,
    host_rows,
    is_host_work,
    rival_rows,
    rows_of,
)

# Lines of a probe by the name of its device.
Probed = dict[str, list[probe.Line]]

TITLE = """\
# Performance

<!-- Made by `python -m benchmarks report` from benchmarks/results; edit benchmarks/report.py instead. -->
"""

METHOD = """\
## Method

Every figure on this page is computed from the JSON lines in `benchmarks/results`. They also say the driver, the
versions, the commit and the date. `make bench` measures the quick set on your machine.

Every step meets what training gives it: gradients at new addresses, and a changed learning rate in each group.
Contenders take turns in one process, in random order. Before that, the first steps of each are compared with
`torch.optim.Adam` in float64 on elements of every tensor. A wrong contender is not timed.

- *ms a step* is the median of cold steps until all is done. The 20th and 80th percentile stand beside it. On a CPU
  other contenders have just used the caches. On a GPU the caches are flushed by reading another buffer.
- *warm* is the median of the steps that follow at once.
- *host* is the time until the Python call of the cold step returns.
- *device* is the GPU's time of a step, with flushed caches and all launches queued before it starts.
- *ratio* compares the cold step with that of torch's fused Adam, round by round. Above 1 is faster than torch's.
- *B/param* is the number of bytes that a step moves for a parameter in the contender's formats. It is computed as
  if each operation read and wrote its tensors once.
- *GB/s* is computed from these bytes and the device time, on a CPU the time of the step.
- *of copy_* compares it with a `copy_` of as many bytes in the same process. On a CPU it may be above 100%: a copy
  also reads the memory that it writes.

In "bf16" contenders keep moments in bf16 where they can, as torch's fused Adam does. In "bf16 fp32-state" they
keep fp32 moments where they can. "Against the fastest other" compares contenders whose moments are of equal size.

The memory may not hold all contenders of a case. Then they are measured in batches, each beside torch's fused
Adam. So are other contenders that the last run left out. Ratios compare contenders of two batches better than
times do.

Host work is the thread time of steps on one thread, interleaved in the same way (`python -m benchmarks host`).
Kernels and the operations behind torch's fused Adam are replaced by functions that return at once. The ratio is to
"torch fused-host". Gradients are at new addresses at each step. Where it says so they are kept: they stay in the
same memory, as after `zero_grad(set_to_none=False)`.
"""

ABSENT = "Nothing has been measured yet.\n"

# A model has less layers where memory did not suffice.
_tensors_of = attrgetter("n_tensors", "n_groups", "numel")


def write(records: Sequence[Record], page: Path, probed: Probed | None = None) -> None:
    """Write the page and the pictures beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(records, probed), encoding="utf-8")
    for plot in plots_of(records):
        draw(plot, page.parent / "images")


def render(records: Sequence[Record], probed: Probed | None = None) -> str:
    """The page's text.

    Args:
        records: of cases and contenders.
        probed: lines of `benchmarks.probe` by the device's name.
    """
    probed = probed or {}
    devices = by_device(records)
    current = {name: latest(found) for name, found in devices.items()}
    results = [_device_section(name, found, probed.get(name, [])) for name, found in current.items()]
    details = [_details_section(name, found, probed.get(name, [])) for name, found in current.items()]
    return "\n".join(part for part in (TITLE, *(results or [ABSENT]), METHOD, *details) if part)


def plots_of(records: Sequence[Record]) -> list[Plot]:
    """The pictures of the page; those with nothing to show are left out."""
    found = []
    for name, of_device in by_device(records).items():
        current = latest(of_device)
        timed = [record for record in current if not is_host_work(record)]
        found += [speeds(timed, f"speed-{slug(name)}"), roofline(timed, f"roofline-{slug(name)}")]
    return [plot for plot in found if plot.series]


def by_device(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each device, GPUs first; a CPU counts once for each number of threads."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: bool(record.environment["device_type"] == "cpu")):
        about = record.environment
        name = about["device"]
        if about["device_type"] == "cpu":
            name += f", {about['n_threads']} thread{'s' * (about['n_threads'] != 1)}"
        found.setdefault(name, []).append(record)
    return found


def latest(records: Sequence[Record]) -> list[Record]:
    """The last record of each contender in each case, in the order of `CASES`.

    Of ours only the commit counts of the last run in which something of the case was timed. Others do not depend
    on it: one that this run left out is shown as measured before, with the same versions and tensors.
    """
    order = {name: index for index, name in enumerate(CASES)}
    newest: list[Record] = []
    for found in by_case(records).values():
        timed = [record for record in found if record.status == TIMED]
        last = max(timed or found, key=lambda record: str(record.environment["run"]))
        counting = [each for each in found if _counts(each, last)]
        # What was run goes before what was not, and the later run before the earlier one.
        counting.sort(key=lambda record: (record.status in (TIMED, WRONG), record.environment["run"]))
        names = dict.fromkeys(record.contender for record in found)
        chosen = {record.contender: record for record in counting}
        newest += [chosen[name] for name in names if name in chosen]
    return sorted(newest, key=lambda record: order.get(record.case, len(order)))


def _counts(record: Record, last: Record) -> bool:
    """Whether a record is shown beside the last one of its case."""
    if record.environment["commit"] == last.environment["commit"]:
        return True
    is_alike = record.environment["versions"] == last.environment["versions"]
    return not record.is_ours and is_alike and (record.status != TIMED or _tensors_of(record) == _tensors_of(last))


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _device_section(name: str, records: list[Record], probed: list[probe.Line]) -> str:
    """What a reader looks for first: the picture, and the tables that compare."""
    timed = [record for record in records if not is_host_work(record)]
    parts = [
        f"## {name}\n",
        *(f"![{plot.title}](images/{plot.name}.svg)\n" for plot in plots_of(timed)),
        _section("Against the fastest other", RIVAL_HEADINGS, rival_rows(records)),
        *(_section(title, probe.MODE_HEADINGS, rows) for title, rows in probe.mode_tables(probed)),
        _section("Host work", HOST_HEADINGS, host_rows(records)),
        _origin(records),
    ]
    return "\n".join(part for part in parts if part)


def _details_section(name: str, records: list[Record], probed: list[probe.Line]) -> str:
    """Every contender of every case."""
    records = [record for record in records if not is_host_work(record)]
    never = _never_timed(records)
    cases = [
        _case_section([record for record in found if record.contender not in never])
        for found in by_case(records).values()
    ]
    absent = ["### Not timed in any case\n", _reasons(list(never.items()))] if never else []
    kernels = _section("Kernels alone", probe.KERNEL_HEADINGS, probe.kernel_rows(probed))
    configs = _section("Memory modes over launches", probe.CONFIG_HEADINGS, probe.config_rows(probed))
    parts = [part for part in (*cases, *absent, kernels, configs) if part]
    return "\n".join([f"## Details: {name}\n", *parts]) if parts else ""


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


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)) + "\n"


def _section(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"### {title}\n\n{_table(headings, rows)}" if rows else ""


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
