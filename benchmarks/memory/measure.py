"""What is measured of each mode."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.memory.histories import HISTORIES, forgetting, largest_update
from benchmarks.memory.modes import MODES
from benchmarks.memory.training import TRAININGS

# Every so many steps of a loss curve are kept.
STRIDE = 10


# What is measured of a mode in one go. What takes longest begins first, so that all processes end together.
PARTS = (*reversed(TRAININGS), "gradients")


def measurements(name: str, part: str, seeds: int) -> list[dict[str, Any]]:
    """What one mode does in a training, seed by seed, or with gradients that are hard on its moments."""
    torch.set_num_threads(1)
    mode = MODES[name]
    if part in TRAININGS:
        return [_training(name, part, seed) for seed in range(seeds)]
    found: list[dict[str, Any]] = [
        {"mode": name, "measure": "largest_update", "of": history, "value": largest_update(mode, history)}
        for history in HISTORIES
    ]
    return [*found, {"mode": name, "measure": "forgetting", "value": forgetting(mode)}]


def _training(name: str, training: str, seed: int) -> dict[str, Any]:
    outcome = TRAININGS[training](MODES[name], seed)
    return {
        **{"mode": name, "measure": "final_loss", "of": training, "seed": seed, "value": outcome.final},
        "losses": [float(f"{loss:.5g}") for loss in outcome.losses[::STRIDE]],
    }
