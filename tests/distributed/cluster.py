"""Worker processes that run scenarios on gloo, started once and used by all tests of a session.

A number of processes has workers and a process group of its own, which they keep: PyTorch remembers for each mesh
what it worked out about operations on its tensors.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from .worker import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONFAULTHANDLER": "1"}
DEADLINE_S = 240.0
GRACE_S = 5.0


class ScenarioFailed(AssertionError):
    """A scenario raised on some processes; the text is what they printed."""


class Cluster:
    """Runs a function of a module beside this one on some processes, which share a process group."""

    def __init__(self, folder: Path) -> None:
        self._workers: dict[int, list[tuple[ForkServerProcess, Connection]]] = {}
        self._folder = folder
        self._n_groups = 0

    def run(self, n_processes: int, scenario: str, **arguments: Any) -> list[Any]:
        """Run ``"module:function"`` on each process and return what each returned, in the order of ranks.

        Raises:
            ScenarioFailed: if any process raised, died or did not answer.
        """
        if n_processes not in self._workers:
            self._workers[n_processes] = self._started(n_processes)
        workers = self._workers[n_processes]
        for _, connection in workers:
            connection.send((scenario, arguments))
        answers = _answers(workers)
        failed = [f"rank {rank}: {text}" for rank, (is_ok, text) in enumerate(answers) if not is_ok]
        if failed:
            # Others may be in the middle of a collective.
            _end(self._workers.pop(n_processes))
            raise ScenarioFailed(f"{scenario} {arguments}\n" + "\n".join(failed))
        return [value for _, value in answers]

    def _started(self, n_processes: int) -> list[tuple[ForkServerProcess, Connection]]:
        self._n_groups += 1
        store = str(self._folder / f"store{self._n_groups}")
        return [_start(store, n_processes, rank) for rank in range(n_processes)]

    def close(self) -> None:
        """End the workers; the next run starts new ones."""
        while self._workers:
            _end(self._workers.popitem()[1])


@contextmanager
def _environment() -> Iterator[None]:
    """What workers inherit. One process imports everything once, and the workers are forked from it."""
    before = dict(os.environ)
    paths = [str(ROOT), *filter(None, [before.get("PYTHONPATH")])]
    os.environ.update({**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start(store: str, n_processes: int, rank: int) -> tuple[ForkServerProcess, Connection]:
    ours, theirs = Pipe()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    with _environment():
        process = context.Process(target=main, args=(theirs, store, n_processes, rank), daemon=True)
        process.start()
    theirs.close()
    return process, ours


def _end(workers: list[tuple[ForkServerProcess, Connection]]) -> None:
    for process, connection in workers:
        connection.close()
        process.kill()
        process.join()


def _answers(workers: list[tuple[ForkServerProcess, Connection]]) -> list[tuple[bool, Any]]:
    """For each worker whether it succeeded, and what it says."""
    answers: dict[int, tuple[bool, Any]] = {}
    until = time.monotonic() + DEADLINE_S
    while len(answers) < len(workers):
        waiting = [rank for rank in range(len(workers)) if rank not in answers]
        ready = wait([workers[rank][1] for rank in waiting], max(0.1, until - time.monotonic()))
        if not ready:
            answers.update(dict.fromkeys(waiting, (False, "no answer in time")))
        for rank in waiting:
            process, connection = workers[rank]
            if connection in ready:
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    process.join()
                    answers[rank] = False, f"died with exit code {process.exitcode}"
                if not answers[rank][0]:
                    # The others may wait for this one in a collective.
                    until = min(until, time.monotonic() + GRACE_S)
    return [answers[rank] for rank in range(len(workers))]
