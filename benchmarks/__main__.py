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

from benchmarks import environment, host, records, tables
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.runner import Run, measure
from benchmarks.selection import SETS, choose_cases, choose_contenders
from dragon.vm.measuring.arguments import device, positive, positive_seconds

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
COMMANDS = ("run", "host", "report", "list")


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
        if options.command == "host":
            return _host(options, Console())
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
    run.add_argument("--dtype", action="append", default=[], metavar="TEXT", help=named)
    run.add_argument("--set", choices=SETS, default="quick", help="cases and contenders that are not named")
    run.add_argument("--device", type=device, default=best, help="by default a GPU if there is one")
    run.add_argument("--threads", type=positive, help="threads of torch on the CPU")
    run.add_argument("--rounds", type=positive, default=25, help="turns of each contender, at most (25)")
    run.add_argument(
        "--turns", type=positive_seconds, default=2.0, metavar="S", help="seconds of each contender a case (2)"
    )
    run.add_argument("--budget", type=float, metavar="S", help="begin no case after this many seconds")
    host_work = commands.add_parser("host", help="measure host work alone, with launches replaced by no-ops")
    host_work.add_argument("--rounds", type=positive, default=host.N_ROUNDS, help="steps of each contender")
    for command in (run, host_work):
        command.add_argument("--out", type=Path, metavar="FILE", help="by default build/benchmarks/<date>.jsonl")
        command.add_argument("--note", help="what a reader must know about this run")
    report = commands.add_parser("report", help="make docs/performance.md and its pictures from the lines")
    report.add_argument("--results", type=Path, default=RESULTS, help="a folder of JSON lines, or one file")
    report.add_argument("--page", type=Path, default=PAGE, help="pictures go into images/ beside it")
    commands.add_parser("list", help="names of cases and contenders")
    return parser


def _out(options: argparse.Namespace, date: str) -> Path:
    name = date.replace(":", "").replace("-", "")
    return options.out or Path("build", "benchmarks", f"{name}.jsonl")


def _run(options: argparse.Namespace, console: Console) -> int:
    """Measure the chosen cases; 1 if a contender is wrong or one of ours failed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = choose_cases(options.case, options.dtype, options.set)
    contenders = choose_contenders(options.contender, options.set)
    about = environment.describe(options.device)
    out = _out(options, about["date"])
    found: list[records.Record] = []
    start = time.monotonic()
    with console.status("") as status:
        run = Run(
            options.device,
            options.rounds,
            options.turns,
            about,
            options.note,
            status.update,
            lambda new: records.append(out, new),
        )
        for case, precision in cases:
            late = options.budget is not None and time.monotonic() - start > options.budget
            reason = f"the run's {options.budget:g} s were used up" if late else None
            try:
                found += measure(run, case, precision, contenders, reason)
            except (RuntimeError, MemoryError) as error:  # out of memory, or a device that failed
                console.print(f"{case.name}, {precision.name}: {error}", markup=False)
                found += _failed(out, about, case.name, precision.name, f"{type(error).__name__} in this case")
    return _finish(found, out, console)


def _failed(out: Path, about: dict[str, object], case: str, precision: str, reason: str) -> list[records.Record]:
    """A record for a case that failed as a whole, which counts as a failure of ours."""
    new = [records.Record(case, precision, "ours", records.FAILED, about, reason=reason)]
    records.append(out, new)
    return new


def _host(options: argparse.Namespace, console: Console) -> int:
    about = environment.describe(torch.device("cpu"))
    out = _out(options, about["date"])
    found = host.measure_all(options.rounds, about, options.note)
    records.append(out, found)
    return _finish(found, out, console)


def _finish(found: list[records.Record], out: Path, console: Console) -> int:
    for table in tables.for_terminal(found, console.width):
        console.print(table)
    console.print(f"{len(found)} lines in {out}")
    defects = [record for record in found if record.is_defect]
    for record in defects:
        console.print(f"{record.status}: {record.case}, {record.contender}: {record.reason}", markup=False)
    return 1 if defects else 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.probe.report import read
    from benchmarks.report import write

    found = records.read(options.results)
    if not found:
        print(
            f"--results {options.results}: there are no results, and {options.page} is left as it is",
            file=sys.stderr,
        )
        return 1
    write(found, options.page, read(options.results / "probe"))
    print(f"{options.page} is what {options.results} gives")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
