"""Measure every mode and write one JSON line a measurement: ``python -m benchmarks.memory``.

Each part of a mode's measurements is made on one thread, as many at a time as there are processors.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.memory.measure import PARTS, measurements
from benchmarks.memory.modes import MODES
from benchmarks.memory.page import RESULTS, write_page
from dragon.vm.measuring.arguments import positive


def main() -> None:
    """Write the lines; the command line is described by ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--mode", action="append", choices=MODES, help="may be repeated; by default all")
    parser.add_argument("--page", action="store_true", help="only bring tables and pictures up to date")
    options = parser.parse_args()
    if not options.page:
        environment = describe(torch.device("cpu"))
        jobs = [(mode, part) for part, mode in product(PARTS, options.mode or MODES)]
        with (
            options.output.open("w", encoding="utf-8") as file,
            ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), get_context("spawn")) as pool,
        ):
            found = pool.map(measurements, *zip(*jobs, strict=True), repeat(options.seeds))
            for job, lines in zip(jobs, found, strict=True):
                for line in lines:
                    file.write(json.dumps({**line, "environment": environment}) + "\n")
                print(*job, sep=": ", flush=True)
    if options.output == RESULTS:
        write_page()


if __name__ == "__main__":
    main()
