"""Scenarios: states that are saved, copied, resharded, and passed on to PyTorch's optimizer and back."""

import copy
import io
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import distribute_tensor

from .factories import largest_difference, make, own, params_of, whole
from .watching import Watch
from .wrappers import WRAPPERS, Wrapped, backward

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def built(kind: str, name: str, **options: Any) -> tuple[Wrapped, Any]:
    wrapped = WRAPPERS[kind]()
    return wrapped, make(name, wrapped.groups, **options)


def train(wrapped: Wrapped, optimizer: Any, steps: range) -> None:
    for step in steps:
        # All processes have the same batch, so that their number does not change the run.
        backward(wrapped._replace(replica=0), step)
        optimizer.step()
        optimizer.zero_grad()


def weights(wrapped: Wrapped) -> list[torch.Tensor]:
    return [whole(param) for param in wrapped.model.parameters()]


def saved_and_copied(kind: str, name: str) -> list[float]:
    """How far runs are from the uninterrupted one that go on from a saved dict, and from a deep copy."""
    wrapped, optimizer = built(kind, name)
    train(wrapped, optimizer, range(2))
    copied = copy.deepcopy(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    before = [param.detach().clone() for param in params_of(optimizer)]
    train(wrapped, optimizer, range(2, 4))
    expected = [own(p) for p in params_of(optimizer)]
    file.seek(0)
    resumed = make(name, wrapped.groups)
    resumed.load_state_dict(torch.load(file, weights_only=False))
    found = []
    for each in (resumed, copied):
        with torch.no_grad():
            for param, value, mine in zip(params_of(optimizer), before, params_of(each), strict=True):
                param.copy_(value)
                if mine is not param:
                    assert torch.equal(own(mine), own(value))
        if each is resumed:
            train(wrapped, each, range(2, 4))
            found.append(largest_difference([own(p) for p in params_of(each)], expected))
    states = [[own(value) for value in state.values()] for state in copied.state.values()]
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)["state"].values()
    found.append(
        max(largest_difference(a, [own(v) for v in b.values()]) for a, b in zip(states, saved, strict=True))
    )
    return found


def dicts(wrapped: Wrapped, optimizer: Any, is_flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    return {
        "model": get_model_state_dict(wrapped.model),
        "optim": get_optimizer_state_dict(wrapped.model, optimizer, options=options),
    }


def save(kind: str, name: str, folder: str, is_flat: bool = False, is_async: bool = False) -> None:
    """Train two steps and save with DCP's default planner."""
    wrapped, optimizer = built(kind, name)
    train(wrapped, optimizer, range(2))
    state = dicts(wrapped, optimizer, is_flat)
    if is_async:
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)


def resume(kind: str, name: str, folder: str, is_flat: bool = False, n_steps: int = 2) -> list[list[float]]:
    """Load into a fresh optimizer, go on, and return the parameters."""
    wrapped, optimizer = built(kind, name)
    state = dicts(wrapped, optimizer, is_flat)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(wrapped.model, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    set_optimizer_state_dict(wrapped.model, optimizer, state["optim"], options=options)
    train(wrapped, optimizer, range(2, 2 + n_steps))
    return [value.flatten().tolist() for value in weights(wrapped)]


def uninterrupted(kind: str, name: str) -> list[list[float]]:
    wrapped, optimizer = built(kind, name)
    train(wrapped, optimizer, range(4))
    return [value.flatten().tolist() for value in weights(wrapped)]


def full_dicts(kind: str, name: str) -> float:
    """A full state dict, offloaded to the CPU of the first process, and broadcast from it."""
    wrapped, optimizer = built(kind, name)
    train(wrapped, optimizer, range(2))
    model, state = (
        get_model_state_dict(wrapped.model, options=FULL),
        get_optimizer_state_dict(wrapped.model, optimizer, options=FULL),
    )
    assert bool(state.get("state")) == (dist.get_rank() == 0)
    # PyTorch's own load would share the step counters of the running optimizer.
    model, state = copy.deepcopy((model, state))
    fresh, resumed = built(kind, name)
    set_model_state_dict(fresh.model, model, options=FROM_FIRST)
    set_optimizer_state_dict(fresh.model, resumed, state, options=FROM_FIRST)
    train(wrapped, optimizer, range(2, 4))
    train(fresh, resumed, range(2, 4))
    return largest_difference(weights(fresh), weights(wrapped))


def options_of_the_first(kind: str, name: str, is_broadcast: bool) -> dict[str, Any]:
    """Options that a full dict gives to an optimizer that was made without them."""
    wrapped, optimizer = built(kind, name)
    optimizer.param_groups[0].update(clip_value=0.5, grad_scale=2.0)
    train(wrapped, optimizer, range(1))
    options = FULL if is_broadcast else StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(wrapped.model, optimizer, options=options))
    fresh, resumed = built(kind, name)
    set_optimizer_state_dict(fresh.model, resumed, state, options=FROM_FIRST if is_broadcast else options)
    return {key: resumed.param_groups[0].get(key) for key in ("clip_value", "grad_scale", "clip_norm")}


def pending_sums(name: str) -> tuple[float, bool]:
    """Sums of gradients go through a pickle, and a state dict of a fresh optimizer consumes none."""
    wrapped, optimizer = built("fsdp2", name)
    backward(wrapped, 0)
    optimizer.sum_grad()
    get_optimizer_state_dict(wrapped.model, optimizer)
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, copied):
        each.step()
    expected = [whole(param) for param in params_of(optimizer)]
    other = WRAPPERS["fsdp2"]()
    is_trained = largest_difference(expected, [whole(param) for param in other.model.parameters()]) > 0.01
    return largest_difference([whole(param) for param in params_of(copied)], expected), is_trained


def loaded_sums(name: str) -> dict[str, int]:
    """How many sums a new optimizer has from a nested dict, from a flat one, and from one of the first process."""
    wrapped, optimizer = built("fsdp2", name)
    backward(wrapped, 0)
    optimizer.sum_grad()
    nested, flat = StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)
    found = {}
    for key, saving, loading in (
        ("nested", nested, nested),
        ("flat", flat, flat),
        ("broadcast", FULL, FROM_FIRST),
    ):
        saved = get_optimizer_state_dict(wrapped.model, optimizer, options=saving)
        other, loader = built("fsdp2", name)
        set_optimizer_state_dict(other.model, loader, saved, options=loading)
        found[key] = sum("grad_sum" in state for state in loader.state_dict()["state"].values())
    return found


def asked_where_some_have_no_state(name: str) -> tuple[int, list[tuple[str, int]]]:
    """The states that a process has after it was asked for them, and the collectives of that.

    The first process has had no gradient so far.
    """
    model = torch.nn.Linear(3, 2)
    optimizer = make(name, model.parameters(), max_grad_norm=1.0, process_group=dist.group.WORLD)
    if dist.get_rank():
        model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with Watch() as watch:
        get_optimizer_state_dict(model, optimizer)
    return len(optimizer.state), watch.collectives


def die_while_saving(kind: str, name: str, folder: str) -> None:
    """Save, train on, and lose the last process while it writes the next checkpoint."""
    wrapped, optimizer = built(kind, name)
    train(wrapped, optimizer, range(2))
    dcp.save(dicts(wrapped, optimizer, False), checkpoint_id=f"{folder}/good")
    train(wrapped, optimizer, range(2, 3))
    writer = dcp.FileSystemWriter(f"{folder}/bad")
    if dist.get_rank() == dist.get_world_size() - 1:
        write = writer.write_data

        def killed(*args: Any) -> Any:
            write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        writer.write_data = killed
    dcp.save(dicts(wrapped, optimizer, False), storage_writer=writer)


def saved_sums(name: str, is_full: bool) -> float:
    """How far a run is that goes on from a checkpoint with sums that no step has used."""
    wrapped, optimizer = built("fsdp2", name)
    train(wrapped, optimizer, range(1))
    backward(wrapped, 1)
    optimizer.sum_grad()
    options = StateDictOptions(full_state_dict=is_full)
    model = get_model_state_dict(wrapped.model, options=options)
    state = copy.deepcopy(get_optimizer_state_dict(wrapped.model, optimizer, options=options))
    fresh, resumed = built("fsdp2", name)
    set_model_state_dict(fresh.model, copy.deepcopy(model), options=options)
    set_optimizer_state_dict(fresh.model, resumed, state, options=options)
    backward(wrapped, 2)
    backward(fresh, 2)
    for each in (optimizer, resumed):
        each.step()
    # An optimizer that lost the sum would differ.
    other, without = built("fsdp2", name)
    train(other, without, range(1))
    backward(other, 2)
    without.step()
    assert largest_difference(weights(other), weights(wrapped)) > 1e-3
    return largest_difference(weights(fresh), weights(wrapped))


def borrowed_group(name: str) -> tuple[bool, str]:
    """Whether a deep copy has the process group of its original, and what is said of pickling it."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = make(name, [param], max_grad_norm=1.0, process_group=dist.group.WORLD)
    copied = copy.deepcopy(optimizer)
    (mine,) = params_of(copied)
    mine.grad = torch.ones(2)
    copied.step()
    try:
        torch.save(optimizer, io.BytesIO())
    except TypeError as error:
        return float(copied.grad_norm) == (2 * dist.get_world_size()) ** 0.5, str(error)
    return False, "accepted"


def whole_dicts(name: str) -> tuple[float, bool]:
    """A state dict of whole tensors goes into sharded parameters, and one of shards into whole parameters."""
    wrapped, optimizer = built("fsdp2", name)
    train(wrapped, optimizer, range(2))
    saved = optimizer.state_dict()
    state = {
        index: {key: whole(value) for key, value in entries.items()} for index, entries in saved["state"].items()
    }
    resumed = make(name, wrapped.groups)
    resumed.load_state_dict({**saved, "state": state})
    alone = make(name, [torch.nn.Parameter(whole(param)) for param in params_of(optimizer)])
    alone.load_state_dict(saved)
    are_same = all(
        torch.equal(entries[key], state[index][key])
        for index, entries in enumerate(alone.state.values())
        for key in state[index]
    )
    before = weights(wrapped)
    train(wrapped, optimizer, range(2, 4))
    expected = weights(wrapped)
    with torch.no_grad():
        for param, value in zip(params_of(optimizer), before, strict=True):
            param.copy_(distribute_tensor(value, param.device_mesh, param.placements))
    train(wrapped, resumed, range(2, 4))
    return largest_difference(weights(wrapped), expected), are_same
