"""Measure every mode and append one JSON line a measurement: ``python -m benchmarks.memory``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.memory.adam import MODES
from benchmarks.memory.histories import HISTORIES, forgetting, largest_update
from benchmarks.memory.training import TRAININGS

# Every so many steps of a loss curve are kept.
STRIDE = 10


def measurements(modes: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    """Yield what each mode does: adversarial gradients, forgetting, and the trainings seed by seed."""
    for name in modes:
        mode = MODES[name]
        for history in HISTORIES:
            yield {
                "mode": name,
                "measure": "largest_update",
                "of": history,
                "value": largest_update(mode, history),
            }
        yield {"mode": name, "measure": "forgetting", "value": forgetting(mode)}
        for training, train in TRAININGS.items():
            for seed in range(seeds):
                outcome = train(mode, seed)
                yield {
                    **{
                        "mode": name,
                        "measure": "final_loss",
                        "of": training,
                        "seed": seed,
                        "value": outcome.final,
                    },
                    "largest_update": outcome.largest_update,
                    "losses": [float(f"{loss:.5g}") for loss in outcome.losses[::STRIDE]],
                }


def main() -> None:
    """Write the lines; the command line is described by ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--mode", action="append", choices=MODES, help="may be repeated; by default all")
    options = parser.parse_args()
    environment = describe(torch.device("cpu"))
    with options.output.open("a", encoding="utf-8") as file:
        for measurement in measurements(options.mode or list(MODES), options.seeds):
            file.write(json.dumps({**measurement, "environment": environment}) + "\n")
            file.flush()
            print({key: value for key, value in measurement.items() if key != "losses"}, flush=True)


if __name__ == "__main__":
    main()
