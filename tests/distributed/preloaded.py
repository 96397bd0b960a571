"""All scenarios, and what PyTorch and triton import late: workers are forked from a process that has them."""

import torch.distributed._composable.replicate
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor._redistribute

import dragon.vm.torch.optim._backends.triton

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
