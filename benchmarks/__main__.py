"""`python -m benchmarks`: measure optimizers side by side, or make the page of what was measured.

Without a command it measures the quick set. Each measurement becomes one JSON line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, records, tables
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.runner import Run, measure
from benchmarks.selection import SETS, choose_cases, choose_contenders

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
COMMANDS = ("run", "report", "list")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; ``--help`` describes them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in COMMANDS and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    parser = _parser()
    options = parser.parse_args(given)
    try:
        if options.command == "run":
            return _run(options, Console())
        if options.command == "report":
            return _report(options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for title, names in (("cases", CASES), ("contenders", CONTENDERS)):
        print(f"{title}:", *names, sep="\n  ")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and append lines to a file")
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = "name or part of it; may be repeated"
    run.add_argument("--case", action="append", default=[], metavar="TEXT", help=named)
    run.add_argument("--contender", action="append", default=[], metavar="TEXT", help=named)
    run.add_argument("--dtype", action="append", default=[], metavar="TEXT", help="fp32 or bf16; may be repeated")
    run.add_argument("--set", choices=SETS, default="quick", help="cases and contenders that are not named")
    run.add_argument("--device", type=torch.device, default=best, help="by default a GPU if there is one")
    run.add_argument("--threads", type=int, help="threads of torch on the CPU")
    run.add_argument("--rounds", type=int, default=25, help="turns of each contender, at most (25)")
    run.add_argument("--turns", type=float, default=2.0, metavar="S", help="seconds of each contender a case (2)")
    run.add_argument("--budget", type=float, metavar="S", help="begin no case after this many seconds")
    run.add_argument("--out", type=Path, metavar="FILE", help="by default build/benchmarks/<date>.jsonl")
    run.add_argument("--note", help="what a reader must know about this run")
    report = commands.add_parser("report", help="make docs/performance.md and its pictures from the lines")
    report.add_argument("--results", type=Path, default=RESULTS, help="a folder of JSON lines, or one file")
    report.add_argument("--page", type=Path, default=PAGE, help="pictures go into images/ beside it")
    commands.add_parser("list", help="names of cases and contenders")
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = choose_cases(options.case, options.dtype, options.set)
    chosen = [choose_contenders(options.contender, options.set, case) for case, _ in cases]
    about = environment.describe(options.device)
    name = about["date"].replace(":", "").replace("-", "")
    out = options.out or Path("build", "benchmarks", f"{name}.jsonl")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[records.Record] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        run = Run(
            options.device,
            options.rounds,
            options.turns,
            about,
            options.note,
            lambda text: progress.update(task, description=text),
        )
        start = time.monotonic()
        for (case, precision), contenders in zip(cases, chosen, strict=True):
            late = options.budget is not None and time.monotonic() - start > options.budget
            reason = f"the run's {options.budget:g} s were used up" if late else None
            try:
                new = list(measure(run, case, precision, contenders, reason))
            except (RuntimeError, MemoryError) as error:  # out of memory, or a device that failed
                console.print(f"{case.name}, {precision.name}: {error}")
                new = list(measure(run, case, precision, contenders, f"{type(error).__name__} in this case"))
            records.append(out, new)
            found += new
            progress.advance(task)
        progress.update(task, description="done")
    for table in tables.for_terminal(found, console.width):
        console.print(table)
    console.print(f"{len(found)} lines in {out}")
    return 1 if any(record.status == records.WRONG for record in found) else 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report import write

    write(records.read(options.results), options.page)
    print(f"{options.page} is what {options.results} gives")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
