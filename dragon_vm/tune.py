"""``dragon-vm tune``, ``doctor`` and ``memory``; ``python -m dragon.vm.tune`` is the first of them."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dragon.vm._words import counted

# Seconds: the common kernels on all cases take less than ten minutes.
BUDGET = 540.0

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """A time such as "90", "90s", "10m" or "1h" in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    time = float(found[1]) * _UNITS[found[2]] if found else 0.0
    # No lock of Python's waits longer.
    if not 0 < time <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f'expected a time like "90s" or "10m", got {text!r}')
    return time


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(prog="dragon-vm", description="Tools around dragon.vm.torch.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    tune = add("tune", "find the fastest launch configurations on this GPU, and store them")
    tune.add_argument(
        "--case", action="append", default=[], help="large, transformer or small; may be repeated; by default all"
    )
    tune.add_argument(
        "--kernel", action="append", default=[], help="a name or part of one, or all; may be repeated"
    )
    tune.add_argument(
        "--time-budget", type=seconds, default=BUDGET, metavar="TIME", help="as in 90s or 10m; by default 9m"
    )
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list the searches")
    instead.add_argument("--show", action="store_true", help="print stored results and ignored files")
    instead.add_argument(
        "--export", type=Path, metavar="FILE", help="print stored results, and write them to a file"
    )
    instead.add_argument(
        "--import", type=Path, metavar="FILE", dest="imported", help="store an exported file's results"
    )
    doctor = add("doctor", "print versions, devices, backends and tuning files, and test each backend")
    doctor.epilog = "The exit code is 1 if something is wrong, and 2 if a possible test was not run."
    memory = add("memory", "print the bytes that each memory mode takes for a model")
    memory.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help="a function without arguments that returns the module, such as my_package.model:make; modules of the "
        "present folder are found, and the model takes no memory",
    )
    return parser


def console(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 1 if a file or the output cannot be written, or if whoever reads it has gone, as ``head`` does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A folder may have a name that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    failure: OSError | None = None
    status = 1
    try:
        status = _console(arguments)
    except OSError as error:
        failure = error
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        failure = failure or error
        # Python writes the rest of the output when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if failure is None:
        return status
    if not isinstance(failure, BrokenPipeError):
        print(f"dragon-vm: error: {failure}", file=sys.stderr)
    return 1


def _console(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    if importlib.util.find_spec("argcomplete") is not None:
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        from dragon.vm.doctor import main as examine

        return examine()
    if options.command == "memory":
        from dragon.vm.memory import ModelError
        from dragon.vm.memory import main as tabulate

        try:
            return tabulate(options.model)
        except ModelError as error:
            parser.error(str(error))
    from dragon.vm.torch.optim._groups.eligibility import why_no_kernels

    if reason := why_no_kernels():
        print(f"There are no kernels to tune: {reason}.")
        if reason == "numpy is not installed":
            print('pip install "dragon-vm-torch[cli]" installs what is needed.')
        return 1
    try:
        return _tune(options)
    except ValueError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        print(f'{error.name} is not installed: pip install "dragon-vm-torch[cli]"')
        return 1


def _tune(options: argparse.Namespace) -> int:
    from dragon.vm.tuning import store

    is_stored = options.show or options.export is not None or options.imported is not None
    if is_stored and (options.kernel or options.case):
        raise ValueError("--kernel and --case choose searches: leave them out with --show, --export and --import")
    if options.imported is not None:
        try:
            stored = store.import_results(options.imported)
        except (OSError, ValueError) as error:
            raise ValueError(f"--import {options.imported}: {error}") from None
        print(f"{counted(len(stored), 'result')} of {options.imported} stored")
        return 0
    if options.show or options.export is not None:
        return _show(options.export)
    return _measure(options)


def _show(export: Path | None) -> int:
    """Print the stored results, and write them to a file if one is named; 1 if there are none."""
    from dragon.vm.torch.optim._backends.configs import tuning_dir
    from dragon.vm.tuning import store
    from dragon.vm.tuning.run import summary

    results = []
    for path, result in store.scan():
        if isinstance(result, str):
            print(f"ignored: {path}: {result}")
        else:
            results.append(result)
            print(f"{result['device']}: {summary(result)}")
    print(f"{counted(len(results), 'result')} in {tuning_dir()}")
    if export is not None and results:
        try:
            store.export_results(export, results)
        except OSError as error:
            raise ValueError(f"--export {export}: {error}") from None
        print(f"{counted(len(results), 'result')} written to {export}")
    return 0 if results or export is None else 1


def _measure(options: argparse.Namespace) -> int:
    """Tune on the present GPU, or rehearse in triton's interpreter; 1 if nothing could be measured."""
    from dragon.kernels.launch import INTERPRETED
    from dragon.vm.measuring.machine import INTERPRETER, present_gpu
    from dragon.vm.torch.optim._backends.configs import tuning_dir
    from dragon.vm.tuning import jobs as known

    if unknown := [size for size in options.case if size not in known.CASES]:
        raise ValueError(f"--case {unknown[0]!r}: there is no such case; there are {', '.join(known.CASES)}")
    jobs = known.plan_jobs(options.kernel, options.case, rehearsal=INTERPRETED)
    machine = INTERPRETER if INTERPRETED else present_gpu()
    if options.dry_run:
        for job in jobs:
            tensors = counted(len(job.numels), "tensor")
            print(f"{job.name}, {job.size}: {tensors}, {sum(job.numels):,} elements")
        where = machine.name if machine else "no GPU, so nothing would be timed"
        print(f"{counted(len(jobs), 'search', 'searches')} on: {where}")
        return 0
    if machine is None:
        print("There is no CUDA or ROCm GPU here to time kernels on.")
        return 1
    from dragon.vm.tuning import store
    from dragon.vm.tuning.run import run, tools_of

    store.check_writable()
    try:
        results = run(jobs, options.time_budget, machine, tools_of(machine), lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("Interrupted: the results of finished searches are stored.")
        return 1
    print(f"{counted(len(results), 'result')} in {tuning_dir()}")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(console(["tune", *sys.argv[1:]]))
