"""Worker processes that run scenarios on gloo, started once and used by all tests of a session."""

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
    """Runs a function of a module beside this one on some processes, which share a process group of their own."""

    def __init__(self, folder: Path) -> None:
        self._workers: list[tuple[ForkServerProcess, Connection]] = []
        self._folder = folder
        self._n_runs = 0

    def run(self, n_processes: int, scenario: str, **arguments: Any) -> list[Any]:
        """Run ``"module:function"`` on each process and return what each returned, in the order of ranks.

        Raises:
            ScenarioFailed: if any process raised, died or did not answer.
        """
        while len(self._workers) < n_processes:
            self._workers.append(_start())
        self._n_runs += 1
        store = str(self._folder / f"store{self._n_runs}")
        workers = self._workers[:n_processes]
        for rank, (_, connection) in enumerate(workers):
            connection.send((store, n_processes, rank, scenario, arguments))
        answers = _answers(workers)
        failed = [f"rank {rank}: {text}" for rank, (is_ok, text, _) in enumerate(answers) if not is_ok]
        if failed:
            if not all(is_alive for *_, is_alive in answers):
                self.close()
            raise ScenarioFailed(f"{scenario} {arguments}\n" + "\n".join(failed))
        return [value for _, value, _ in answers]

    def close(self) -> None:
        """End the workers; the next run starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


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


def _start() -> tuple[ForkServerProcess, Connection]:
    ours, theirs = Pipe()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    with _environment():
        process = context.Process(target=main, args=(theirs,), daemon=True)
        process.start()
    theirs.close()
    return process, ours


def _answers(workers: list[tuple[ForkServerProcess, Connection]]) -> list[tuple[bool, Any, bool]]:
    """For each worker whether it succeeded, what it says, and whether it lives."""
    answers: dict[int, tuple[bool, Any, bool]] = {}
    until = time.monotonic() + DEADLINE_S
    while len(answers) < len(workers):
        waiting = [rank for rank in range(len(workers)) if rank not in answers]
        ready = wait([workers[rank][1] for rank in waiting], max(0.1, until - time.monotonic()))
        if not ready:
            answers.update(dict.fromkeys(waiting, (False, "no answer in time", False)))
        for rank in waiting:
            process, connection = workers[rank]
            if connection in ready:
                try:
                    answers[rank] = (*connection.recv(), True)
                except EOFError:
                    process.join()
                    answers[rank] = False, f"died with exit code {process.exitcode}", False
                if not answers[rank][0]:
                    # The others may wait for this one in a collective.
                    until = min(until, time.monotonic() + GRACE_S)
    return [answers[rank] for rank in range(len(workers))]
