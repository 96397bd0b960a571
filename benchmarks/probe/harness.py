"""Where a probe runs, and how it says what it has measured."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dragon.vm.measuring.machine import INTERPRETER, present_gpu, versions
from dragon.vm.measuring.timer import Timer


class Probe:
    """A device, its timer, and a file of JSON lines; a context that closes the file.

    Attributes:
        is_dry: whether kernels are interpreted, on tiny tensors.
        machine: the device.
        timer: of the device.
        copy_gb_per_s: of `copy_`; None until it is measured.
        n_failed: parts and checks that failed.

    Args:
        path: of the lines, which are appended.
        is_dry: see above.

    Raises:
        RuntimeError: if there is no GPU, and the probe is not dry.
    """

    def __init__(self, path: Path, is_dry: bool) -> None:
        machine = INTERPRETER if is_dry else present_gpu()
        if machine is None:
            raise RuntimeError("there is no CUDA or ROCm GPU here; --dry runs without one")
        self.is_dry, self.machine, self.timer = is_dry, machine, Timer(machine.device)
        self.copy_gb_per_s: float | None = None
        self.n_failed = 0
        self._n_times = 1 if is_dry else 15
        self._start = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self.say("device", name=machine.name, arch=machine.arch, processors=machine.n_processors, **versions())

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def say(self, part: str, **values: Any) -> None:
        """Print a line and write it to the file; numbers keep 5 digits."""
        plain = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in values.items()}
        line = json.dumps({"part": part, "at_s": round(time.monotonic() - self._start, 1), **plain})
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()

    def fail(self, part: str, **values: Any) -> None:
        """Say that something is wrong."""
        self.n_failed += 1
        self.say(part, failed=True, **values)

    def run(self, name: str, part: Callable[[Probe], None]) -> None:
        """Run a part; whatever it raises becomes a line."""
        try:
            part(self)
        # One part must not take the next ones with it.
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:500]
            self.fail(name, error=text, where=f"{Path(where.filename).name}:{where.lineno}")
        if not self.timer.is_cpu:
            torch.cuda.empty_cache()

    def sized(self, numel: int, dry_numel: int) -> int:
        """The first number on a GPU, the second one in a dry run."""
        return dry_numel if self.is_dry else numel

    def median_ms(self, calls: Sequence[Callable[[], object]], host_ms: float = 0.0) -> list[float]:
        """Median device time of each call, taken in turns."""
        for call in calls:
            call()
        rounds = [self.timer.device_ms(calls, host_ms) for _ in range(self._n_times)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]

    def rate(self, nbytes: int, ms: float) -> dict[str, float | None]:
        """Time, bandwidth, and its share of a copy's, as fields of a line."""
        gb_per_s = nbytes / ms / 1e6
        share = gb_per_s / self.copy_gb_per_s if self.copy_gb_per_s else None
        return {"ms": ms, "gb_per_s": gb_per_s, "of_copy": share}
