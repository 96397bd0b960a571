"""What a step is asked to do, and what it answers."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._gradients.scaling import Scaling
from dragon.vm.torch.optim._gradients.shared_norm import Reductions
from dragon.vm.torch.optim._groups.buffers import FlatBuffer
from dragon.vm.torch.optim._groups.members import Members
from dragon.vm.torch.optim._options import Settings, Version


class Recipe(NamedTuple):
    """Everything that the plan of a step may know. A plan does not keep it.

    Attributes:
        owner: name of the optimizer's class, for errors.
        algorithm: what is computed.
        settings: options of the optimizer as a whole.
        groups: parameter groups with all options, without their parameters.
        version: of these.
        param_groups: those of the optimizer.
        state: states by parameter.
        members: all parameters and their gradients.
        scaling: of the gradients.
        buffers: flat buffers; a plan takes out those that their parameters have left.
        devices: by device, what kernels share from plan to plan.
        reductions: sums over the processes that share the model; None if there are no others or nobody asks.
        zero_grad: whether the step sets the gradients to zero.
        are_own: whether the gradients are the parameters' own, and not sums of them.
        are_last: whether nobody reads the gradients after the step.
    """

    owner: str
    algorithm: Algorithm
    settings: Settings
    groups: list[dict[str, Any]]
    version: Version
    param_groups: list[dict[str, Any]]
    state: MutableMapping[Any, Any]
    members: Members
    scaling: Scaling
    buffers: list[FlatBuffer]
    devices: dict[torch.device, Any]
    reductions: Reductions | None
    zero_grad: bool
    are_own: bool
    are_last: bool


class Chosen(NamedTuple):
    """The parameters that a plan is for. Lists have one element a parameter.

    Attributes:
        positions: theirs among all parameters of the optimizer.
        params: parameters.
        shards: for each the tensor that this process updates.
        grads: their gradients, likewise; None, or a tensor laid out like the parameter, for one that has none.
        group_index: index of each one's parameter group.
    """

    positions: list[int]
    params: list[Tensor]
    shards: list[Tensor]
    grads: list[Any]
    group_index: list[int]


class Outcome(NamedTuple):
    """What a step decided on the host; what it decided on a device stays there until somebody asks.

    Attributes:
        grad_norm: norm of all gradients together, float64 0-dim, or where kernels leave it; None if nobody asked.
        n_skipped: 1 for a skipped step, else 0; a tensor where other processes decided.
    """

    grad_norm: Tensor | None = None
    n_skipped: int | Tensor = 0
