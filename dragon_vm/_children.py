"""Swap in the processes that a script starts by `multiprocessing`, and report once for all ranks."""

from __future__ import annotations

import multiprocessing.spawn
import multiprocessing.util
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dragon.vm.torch.optim import swap
from dragon.vm.torch.optim._swap import Swap


def print_report(swapped: Swap) -> None:
    """Print a report on stderr, in the process of rank 0 alone."""
    flush_stdout()
    if swapped.rank == 0:
        say(f"dragon.vm.run: {swapped.report()}")


def flush_stdout() -> None:
    """Write out what the script has printed, unless it has closed or removed the stream."""
    with suppress(AttributeError, ValueError, OSError):
        sys.stdout.flush()


def say(text: str) -> None:
    """Print a line on stderr, unless the script has closed or removed the stream."""
    with suppress(AttributeError, ValueError, OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class SwapInChild:
    """A swap that is put in force where it is unpickled."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _swap_in_child, (self._options,)


def include_children(swapped: Swap) -> Callable[[], None]:
    """Let the processes that `multiprocessing` starts from now on swap too, and report; return what undoes it."""
    plain = multiprocessing.spawn.get_preparation_data

    def with_swap(name: str) -> dict[str, Any]:
        return {**plain(name), "dragon.vm.run": SwapInChild(swapped.options)}

    # The child unpickles this before it imports the script, and ignores names that it does not know.
    multiprocessing.spawn.get_preparation_data = with_swap
    # A forked child has the swap already, with what its parent has built.
    multiprocessing.util.register_after_fork(swapped, _begin_anew)
    reference = weakref.ref(swapped)
    # Windows has no forks.
    if hasattr(os, "register_at_fork"):
        # Of a child by `os.fork` too, which ends as its parent does.
        os.register_at_fork(after_in_child=lambda: _forget(reference()))

    def undo() -> None:
        multiprocessing.spawn.get_preparation_data = plain

    return undo


def _forget(swapped: Swap | None) -> None:
    """Leave to the parent what it has built."""
    if swapped is not None:
        swapped.replaced.clear()
        swapped.left_alone.clear()


def _begin_anew(swapped: Swap) -> None:
    _forget(swapped)
    multiprocessing.util.Finalize(None, print_findings, args=(swapped,), exitpriority=0)


def _swap_in_child(options: dict[str, Any]) -> None:
    swapped = swap(**options)
    include_children(swapped)
    _begin_anew(swapped)


def print_findings(swapped: Swap) -> None:
    """Print a child's report if it has built anything: most children load data."""
    if swapped.replaced or swapped.left_alone:
        print_report(swapped)
