"""What is measured of one mode."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.memory.histories import HISTORIES, forgetting, largest_update
from benchmarks.memory.modes import MODES
from benchmarks.memory.training import TRAININGS

# Every so many steps of a loss curve are kept.
STRIDE = 10


def measurements(name: str, seeds: int) -> list[dict[str, Any]]:
    """What one mode does: adversarial gradients, forgetting, and the trainings seed by seed."""
    torch.set_num_threads(1)
    mode = MODES[name]
    found: list[dict[str, Any]] = [
        {"mode": name, "measure": "largest_update", "of": history, "value": largest_update(mode, history)}
        for history in HISTORIES
    ]
    found.append({"mode": name, "measure": "forgetting", "value": forgetting(mode)})
    for training, train in TRAININGS.items():
        for seed in range(seeds):
            outcome = train(mode, seed)
            losses = [float(f"{loss:.5g}") for loss in outcome.losses[::STRIDE]]
            found.append(
                {
                    **{"mode": name, "measure": "final_loss", "of": training, "seed": seed},
                    **{"value": outcome.final, "losses": losses},
                }
            )
    return found
