"""Run an unmodified script with our optimizers: ``python -m dragon.vm.run script.py arguments ...``."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dragon.vm.torch.optim import swap
from dragon.vm.torch.optim._swap import Replaced

USAGE = "usage: python -m dragon.vm.run {script.py | -m module} [argument ...]"


def main(arguments: Sequence[str]) -> int:
    """Run a script, or a module after ``-m``, as `python` would, and report what was replaced.

    Args:
        arguments: the script and its arguments.

    Returns:
        The exit code: 0, 1 after an uncaught exception, 2 without a script.

    Raises:
        SystemExit: what the script raised.
    """
    as_module = list(arguments[:1]) == ["-m"]
    argv = list(arguments[1:] if as_module else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        return 0 if argv else 2
    sys.argv = argv
    # The folder in which `python` would look for the script's own modules.
    sys.path[0] = str(Path.cwd() if as_module else Path(argv[0]).resolve().parent)
    swapped = swap()
    try:
        if as_module:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except Exception as error:
        sys.stdout.flush()
        _print_error(error)
        return 1
    finally:
        swapped.undo()
        sys.stdout.flush()
        print(report(swapped.replaced), file=sys.stderr)
    return 0


def report(replaced: Sequence[Replaced]) -> str:
    """Say which optimizers were replaced, how many parameters they had and how many steps they took."""
    if not replaced:
        return "dragon.vm.run: no optimizer was replaced"
    lines = [f"dragon.vm.run: {len(replaced)} optimizer{'s' * (len(replaced) != 1)} replaced"]
    for entry in replaced:
        n_tensors, n_params = entry.counts()
        lines.append(
            f"  torch.optim.{entry.name}: {n_params} parameters in {n_tensors} tensors, {entry.n_steps} steps"
        )
    return "\n".join(lines)


def _print_error(error: Exception) -> None:
    """Print an uncaught exception as `python` would, without the frames that ran the script."""
    inside = _inside(error.__traceback__)
    error = error.with_traceback(inside or error.__traceback__)
    sys.excepthook(type(error), error, error.__traceback__)


def _inside(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that is below this file and `runpy`; None if nothing is."""
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and traceback.extract_tb(trace, 1)[0].filename in own:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
