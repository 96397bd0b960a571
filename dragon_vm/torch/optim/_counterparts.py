"""Ours in the place of PyTorch's: which class, and which of the options that a swap has for all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from dragon.vm.torch.optim._formats.resolve import MOMENTS
from dragon.vm.torch.optim.adam import Adam, AdamW
from dragon.vm.torch.optim.optimizer import Optimizer
from dragon.vm.torch.optim.sgd import SGD

OURS: dict[type[torch.optim.Optimizer], type[Optimizer]] = {
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.SGD: SGD,
}


def own_options(original: type[torch.optim.Optimizer] = torch.optim.Adam) -> set[str]:
    """The names of the options that ours has and PyTorch's lacks."""
    return set(inspect.signature(OURS[original]).parameters) - set(inspect.signature(original).parameters)


def options_for(original: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that ours has; of dtypes by name, those that are not of another optimizer's states."""
    known = own_options(original)
    found = {name: value for name, value in options.items() if name in known}
    if isinstance(asked := found.get("state_dtype"), Mapping):
        others = set(MOMENTS).difference(OURS[original]._algorithm.states)
        found["state_dtype"] = {name: value for name, value in asked.items() if name not in others}
    return found
