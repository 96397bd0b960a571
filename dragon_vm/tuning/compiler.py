"""Compile candidates ahead of time, on all cores, each in a process that may crash.

A worker's protocol is a line of JSON for a task and a line for its answer. Workers never see TRITON_INTERPRET, so
that kernels are compiled from processes that interpret theirs, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol

from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant
from dragon.vm.tuning.ranking import Facts

# More would compete for memory on a machine with many cores: each holds its own compiler.
MOST_WORKERS = 16


class Compiler(Protocol):
    """Anything that tells facts of configurations."""

    def compile(
        self, variant: Variant, configs: Sequence[LaunchConfig], arch: str
    ) -> Iterator[tuple[LaunchConfig, Facts | str]]:
        """Yield facts as they come, or why a configuration does not compile."""
        ...


class Worker:
    """A process that compiles, and is started again if a configuration takes it down.

    Args:
        cache: folder for what is compiled; None for one that goes away.
    """

    def __init__(self, cache: str | None = None) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._cache = {} if cache is None else {"TRITON_CACHE_DIR": cache}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            # A session of its own: Ctrl-C is for this process, which ends its workers in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dragon.vm.tuning.worker"],
                env=environment | self._cache,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        return self._process

    def ask(self, task: dict[str, Any]) -> Facts | str:
        """Facts of one configuration, or why there are none."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self.close()
            return f"the compiler died (exit status {process.returncode})"
        answer = json.loads(line)
        return answer["error"] if "error" in answer else Facts(**answer)

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # A task may still be on its way to the process that is gone.
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()


class Workers:
    """A `Compiler` of worker processes, to be closed after use.

    Args:
        n_workers: processes; by default one a core.
        cache: folder for what is compiled, such as this process's own; None for one that goes away.
    """

    def __init__(self, n_workers: int | None = None, cache: str | None = None) -> None:
        self._n_workers = n_workers or min(os.cpu_count() or 1, MOST_WORKERS)
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._workers = [Worker(cache) for _ in range(self._n_workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.close()

    def compile(
        self, variant: Variant, configs: Sequence[LaunchConfig], arch: str
    ) -> Iterator[tuple[LaunchConfig, Facts | str]]:
        """Yield facts as they come, or why a configuration does not compile."""
        executor = ThreadPoolExecutor(self._n_workers)
        try:
            futures = {executor.submit(self._compile, variant, config, arch): config for config in configs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, variant: Variant, config: LaunchConfig, arch: str) -> Facts | str:
        worker = self._idle.get()
        try:
            return worker.ask({"variant": variant._asdict(), "config": vars(config), "arch": arch})
        finally:
            self._idle.put(worker)
