"""All scenarios, and what PyTorch and triton import late: workers are forked from a process that has them."""

from tests.interpreter import speed_up

from . import (
    accumulation,
    averages,
    checkpoints,
    memory,
    memory_checkpoints,
    ownership,
    placements,
    reductions,
    refusals,
    release,
    soak,
    steps,
    training,
)

__all__ = [
    "accumulation",
    "averages",
    "checkpoints",
    "memory",
    "memory_checkpoints",
    "ownership",
    "placements",
    "reductions",
    "refusals",
    "release",
    "soak",
    "steps",
    "training",
]

speed_up()
