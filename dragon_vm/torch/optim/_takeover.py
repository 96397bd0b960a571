"""Go on where an optimizer of PyTorch is: its groups, hyperparameters and state."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor

from dragon.vm.torch.optim._accumulate import AccumulatingOptimizer
from dragon.vm.torch.optim._checkpoint import CheckpointedOptimizer
from dragon.vm.torch.optim._groups.bounds import keep_bounds, may_be_narrow
from dragon.vm.torch.optim._groups.restored import restored_states
from dragon.vm.torch.optim._modes import with_plain_tensors
from dragon.vm.torch.optim._storage import StoringOptimizer

OptimizerT = TypeVar("OptimizerT", bound=CheckpointedOptimizer)


def take_over(
    make: Callable[..., OptimizerT],
    original: torch.optim.Optimizer,
    expected: type[torch.optim.Optimizer],
    options: dict[str, Any],
) -> OptimizerT:
    """Make an optimizer of the same parameters in the same state.

    Hyperparameters that are tensors are the original's own, so that whoever holds them still changes them; state
    tensors are copies. `options` go before what the original, which is an `expected`, and each of its groups have.
    """
    if not isinstance(original, expected):
        raise TypeError(
            f"from_torch takes a torch.optim.{expected.__name__}, but got {torch.typename(original)}: "
            "another algorithm's state means something else"
        )
    if isinstance(original, AccumulatingOptimizer) and (original._sums or original._handed_over):
        raise RuntimeError(
            "from_torch of an optimizer with sums of sum_grad() that no step has used: call its step() first, or "
            "make a new optimizer and load its state_dict(), which has them"
        )
    if isinstance(original, StoringOptimizer):
        # Masters of before a write to the parameters would be taken for the parameters' own.
        original._settle_masters()
        with_plain_tensors(original._complete_switched_on)
    # PyTorch's groups are complete: what was asked for would not reach them as a default.
    groups = [{name: options.get(name, value) for name, value in group.items()} for group in original.param_groups]
    for group in groups if "lr" in options else ():
        # A scheduler of the original began with another rate.
        group.pop("initial_lr", None)
    optimizer = make(groups, **{**original.defaults, **options})
    loaded = optimizer._algorithm, optimizer._settings, optimizer.param_groups
    states = with_plain_tensors(lambda: restored_states(*loaded, original.param_groups, original.state))
    others = {key: deepcopy(value) for key, value in original.state.items() if not isinstance(key, Tensor)}
    optimizer.state.update({**others, **states})
    pairs = zip(optimizer.param_groups, original.param_groups, strict=True)
    for group, old in pairs if "betas" in options else ():
        # Narrow moments were made with other betas than those that are asked for.
        if may_be_narrow(group) and any(map(optimizer.state.get, group["params"])):
            group["bound_betas"] = old.get("bound_betas") or tuple(map(float, old["betas"]))
    keep_bounds(optimizer.param_groups, optimizer.state)
    return optimizer
