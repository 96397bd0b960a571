"""Go on where a running optimizer is: its groups, hyperparameters and state."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dragon.vm.torch.optim._groups.bounds import keep_bounds, may_be_narrow
from dragon.vm.torch.optim._groups.restored import restored_states
from dragon.vm.torch.optim._modes import with_plain_tensors
from dragon.vm.torch.optim._storage import StoringOptimizer


class TakingOptimizer(StoringOptimizer):
    """An optimizer that can be made of a running one."""

    # PyTorch's class of the same algorithm.
    _counterpart: type[torch.optim.Optimizer]

    @classmethod
    def from_torch(cls, optimizer: torch.optim.Optimizer, **options: Any) -> Self:
        """Take over a running optimizer of PyTorch's: its groups, hyperparameters, state, and Adam's epsilon.

        Hyperparameters that are tensors are the optimizer's own, so that whoever holds them still changes them.
        State tensors are copies.

        Args:
            optimizer: it keeps its state, hooks and schedulers, but is not to update the same parameters any more.
            **options: as of the class. One that the groups have too, such as `lr`, takes the place of theirs in
                all of them.

        Raises:
            RuntimeError: for an optimizer of this library with sums of `sum_grad` that no step has used.
            TypeError: for an optimizer of another algorithm.
            ValueError: for a state that does not fit, and for an `AdamW` of one whose decay is not decoupled.
        """
        if not isinstance(optimizer, cls._counterpart):
            raise TypeError(
                f"from_torch takes a torch.optim.{cls._counterpart.__name__}, but got "
                f"{torch.typename(optimizer)}: another algorithm's state means something else"
            )
        if not isinstance(optimizer, TakingOptimizer):
            if "epsilon_hat" in cls._algorithm.fused_names:
                options.setdefault("epsilon_hat", False)
        elif optimizer._sums or optimizer._handed_over:
            raise RuntimeError(
                "from_torch of an optimizer with sums of sum_grad() that no step has used: call its step() first, "
                "or make a new optimizer and load its state_dict(), which has them"
            )
        else:
            # Masters of before a write to the parameters would be taken for the parameters' own.
            optimizer._settle_masters()
            with_plain_tensors(optimizer._complete_switched_on)
        # PyTorch's groups are complete: what was asked for would not reach them as a default.
        groups = [
            {name: options.get(name, value) for name, value in group.items()} for group in optimizer.param_groups
        ]
        for group in groups if "lr" in options else ():
            # A scheduler of the optimizer began with another rate.
            group.pop("initial_lr", None)
        make: Callable[..., Self] = cls
        made = make(groups, **{**optimizer.defaults, **options})
        made._take_states(optimizer, keep_betas="betas" in options)
        return made

    def _behind_counterpart(self) -> Any:
        """What PyTorch's class finds by its ``super()``: its base, or a class that a program derives from that."""
        return super(self._counterpart, self)

    def _take_states(self, original: torch.optim.Optimizer, *, keep_betas: bool) -> None:
        """Copy all states; with `keep_betas` groups note those that narrow moments were made with."""
        loaded = self._algorithm, self._settings, self.param_groups
        states = with_plain_tensors(lambda: restored_states(*loaded, original.param_groups, original.state))
        others = {key: deepcopy(value) for key, value in original.state.items() if not isinstance(key, Tensor)}
        self.state.update({**others, **states})
        pairs = zip(self.param_groups, original.param_groups, strict=True)
        for group, old in pairs if keep_betas else ():
            if may_be_narrow(group) and any(map(self.state.get, group["params"])):
                group["bound_betas"] = old.get("bound_betas") or tuple(map(float, old["betas"]))
        keep_bounds(self.param_groups, self.state)
