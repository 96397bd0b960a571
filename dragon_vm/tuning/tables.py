"""Rankings, results and what is in force, as tables; in Markdown where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from dragon.vm.tuning.candidates import describe
from dragon.vm.tuning.estimate import Ranking
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.lookup import Found
from dragon.vm.tuning.ranking import Ranked, nbytes_in_flight, resident_warps
from dragon.vm.tuning.record import Record
from dragon.vm.tuning.store import Ignored

NO_VALUE = "-"


def make_table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table, in Markdown if the console is no terminal; columns of figures stand to the right."""
    table = Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    rows = [list(row) for row in rows]
    for index, heading in enumerate(headings):
        cells = [row[index] for row in rows]
        figures = all(cell[:1].isdigit() or cell[:1] in "+-" for cell in cells)
        table.add_column(heading, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def ranking_rows(ranking: Ranking, n_best: int | None = None) -> list[list[str]]:
    """A row for each of the best candidates, for the default, and for each that is dropped."""
    rows = []
    for place, entry in enumerate(ranking.entries, 1):
        is_default = entry.config == ranking.default
        if n_best is None or place <= n_best or is_default or entry.dropped:
            rows.append(_ranking_row(ranking, entry, place, is_default))
    return rows


RANKING_HEADINGS = (
    *("kernel", "place", "chunk/warps", "registers", "spilled B", "shared B", "warps resident", "KiB in flight"),
    *("instructions/element", "verdict"),
)


def _ranking_row(ranking: Ranking, entry: Ranked, place: int, is_default: bool) -> list[str]:
    figures = [NO_VALUE] * 6
    if (facts := entry.facts) is not None:
        figures = [
            str(facts.registers),
            str(facts.spilled_nbytes),
            str(facts.shared_nbytes),
            str(resident_warps(entry.config, facts, ranking.limits)),
            f"{nbytes_in_flight(entry.config, facts, ranking.limits) / 1024:g}",
            f"{facts.instructions:.1f}",
        ]
    verdict = entry.dropped or "worth timing"
    config = describe(entry.config) + (" (default)" if is_default else "")
    return [ranking.name, NO_VALUE if entry.dropped else str(place), config, *figures, verdict]


RESULT_HEADINGS = ("kernel", "case", "config", "ms", "default ms", "of copy_", "decision")


def result_row(name: str, record: Record) -> list[str]:
    """A result in a line; an estimate has no times."""
    figures = [NO_VALUE] * 3
    if (times := record.times) is not None:
        figures = [
            f"{times.best.median_ms:.4f}",
            f"{times.default.median_ms:.4f}",
            f"{times.share_of_copy:.0%}",
        ]
    unfinished = "" if record.finished else " (interrupted)"
    return [name, record.case, describe(record.config), *figures, record.reason + unfinished]


FORCE_HEADINGS = ("kernel", "size", "config", "source", "why")


def force_row(name: str, size: str, found: Found) -> list[str]:
    """What is in force for a kernel variant and size, and why."""
    return [name, size, describe(found.config), found.source, found.why]


JOB_HEADINGS = ("kernel", "case", "tensors", "elements", "shapes to compile", "MiB moved")


def job_row(job: Job, n_shapes: int, nbytes_an_element: int) -> list[str]:
    """What would run."""
    numel = sum(job.case.numels)
    mebibytes = f"{numel * nbytes_an_element / 2**20:.0f}"
    return [job.name, job.case.name, str(len(job.case.numels)), str(numel), str(n_shapes), mebibytes]


def ignored_lines(ignored: Iterable[Ignored]) -> list[str]:
    """Files that are not used, and why."""
    return [f"ignored: {path}: {reason}" for path, reason in ignored]
