"""Scenarios: one optimizer under a wrapper and one in one process, through any events of a training script."""

import copy
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dragon.vm.torch.optim import AdamW

from .factories import params_of
from .memory import Alone, Run, as_param, unexpected


def interleaved(
    kind: str, mode: str, name: str, options: dict[str, Any], events: list[Any], n_late: int
) -> list[str]:
    """What differs after some events, each a name of a function below and its arguments."""
    run = Run(kind, mode, name, n_late, **options)
    alone = Alone(run)
    # Nothing is summed or skipped before there are states.
    for event, *arguments in (("step", 0, []), *events):
        for each in (run, alone):
            EVENTS[event](each, *arguments)
    return unexpected(run, alone)


def step(each: Run, seed: int, missing: list[int]) -> None:
    """A step in which some parameters may have no gradient."""
    each.backward(seed)
    for index in missing:
        each.params[index % len(each.params)].grad = None
    each.optimizer.step()
    each.optimizer.zero_grad()


def sum_up(each: Run, seed: int) -> None:
    each.backward(seed)
    each.optimizer.sum_grad()


def skip(each: Run, seed: int, index: int) -> None:
    """A step with one infinite element, in whichever processes have it."""
    each.backward(seed)
    known = params_of(each.optimizer)
    param = known[index % len(known)]
    poison = torch.zeros(param.shape, dtype=param.dtype)
    poison.view(-1)[seed % poison.numel()] = torch.inf
    param.grad = param.grad + as_param(param, poison)
    n_skipped = each.optimizer.n_skipped_steps
    each.optimizer.step()
    each.optimizer.zero_grad()
    assert each.optimizer.n_skipped_steps == n_skipped + 1


def change(each: Run, changes: dict[str, Any]) -> None:
    for group in each.optimizer.param_groups:
        group.update(changes)


def write(each: Run, factor: float) -> None:
    """The weights are changed by somebody else."""
    with torch.no_grad():
        for param in each.params:
            param.mul_(factor)


def average(each: Run) -> None:
    if any("ema" in state for state in each.optimizer.state.values()):
        with each.optimizer.swap_ema():
            each.optimizer.state_dict()


def join(each: Run) -> None:
    """The remaining parameters join the optimizer."""
    if each.late:
        each.optimizer.add_param_group({"params": each.late, "lr": 0.03})
        each.late = []


def load(each: Run, how: str) -> None:
    """Go on from a state dict, in the same optimizer or a new one."""
    if how == "fresh":
        groups = [dict(group) for group in each.optimizer.param_groups]
        saved = copy.deepcopy(each.optimizer.state_dict())
        each.optimizer = AdamW(groups, backend=each.backend, **each.options)
        each.optimizer.load_state_dict(saved)
    elif how == "same" or isinstance(each, Alone) or each.late:
        # PyTorch's checkpoint functions want all parameters of the model in the optimizer.
        each.optimizer.load_state_dict(copy.deepcopy(each.optimizer.state_dict()))
    else:
        # Not strict: a parameter that joined a moment ago has no state.
        options = StateDictOptions(full_state_dict=how == "full", broadcast_from_rank0=how == "full", strict=False)
        saving = StateDictOptions(full_state_dict=how == "full", cpu_offload=how == "full")
        state = copy.deepcopy(get_optimizer_state_dict(each.model, each.optimizer, options=saving))
        set_optimizer_state_dict(each.model, each.optimizer, state, options=options)


EVENTS = {function.__name__: function for function in (step, sum_up, skip, change, write, average, join, load)}
