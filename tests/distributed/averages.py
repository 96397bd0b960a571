"""Scenarios: parameters exchanged with their exponential moving averages under a wrapper."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.func import functional_call

from .factories import make, params_of, whole
from .training import EVEN, names
from .wrappers import WRAPPERS, EvenNet, Net, backward, batch

TOLERANCE = 1e-5


def swapped(kind: str, name: str) -> None:
    """An evaluation inside sees the averages, one outside and the next step the weights."""
    wrapped = WRAPPERS[kind]()
    optimizer = make(name, wrapped.groups, ema_decay=0.5)
    alone = EvenNet() if kind in EVEN else Net()
    x = batch(99)

    def check(values: dict[str, Any]) -> None:
        with torch.no_grad():
            found = wrapped.model(x)
        expected = functional_call(alone, values, (x,))
        assert torch.allclose(found, expected, atol=TOLERANCE), float((found - expected).abs().max())

    for step in range(3):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
        weights = dict(zip(names(wrapped), map(whole, params_of(optimizer)), strict=True))
        averages = {
            key: whole(optimizer.state[p]["ema"]) for key, p in zip(weights, params_of(optimizer), strict=True)
        }
        if step:
            assert max(float((weights[key] - averages[key]).abs().max()) for key in weights) > 100 * TOLERANCE
        # FSDP2 keeps the parameters of its root whole after this.
        check(weights)
        with optimizer.swap_ema():
            check(averages)
            full = get_model_state_dict(wrapped.model, options=StateDictOptions(full_state_dict=True))
            for key, value in full.items():
                assert torch.equal(value, averages[key]), key
        check(weights)
        after = dict(zip(weights, map(whole, params_of(optimizer)), strict=True))
        assert all(torch.equal(weights[key], after[key]) for key in weights)


def begun(kind: str, name: str, folder: str, loaded: str) -> list[float]:
    """The averages' largest distances from the weights that were loaded after the states had been asked for.

    A step of rate 0 follows. What is loaded of the optimizer, "by PyTorch" or "in place", has averages of zeros.
    """
    wrapped = WRAPPERS[kind]()
    optimizer = make(name, wrapped.groups, ema_decay=0.5)
    if loaded != "nothing":
        for step in range(2):
            backward(wrapped, step)
            optimizer.step()
            optimizer.zero_grad()
        for param in params_of(optimizer):
            optimizer.state[param]["ema"].zero_()
        dcp.save({"optim": get_optimizer_state_dict(wrapped.model, optimizer)}, checkpoint_id=folder)
        wrapped = WRAPPERS[kind]()
        optimizer = make(name, wrapped.groups, ema_decay=0.5)
    state = {"optim": get_optimizer_state_dict(wrapped.model, optimizer)}
    model = get_model_state_dict(wrapped.model)
    set_model_state_dict(wrapped.model, {key: torch.full_like(value, 3.0) for key, value in model.items()})
    if loaded != "nothing":
        dcp.load(state, checkpoint_id=folder)
    if loaded == "by PyTorch":
        set_optimizer_state_dict(wrapped.model, optimizer, state["optim"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    found = []
    for step in range(2):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(max(float((3.0 - whole(optimizer.state[p]["ema"])).max()) for p in params_of(optimizer)))
    return found
