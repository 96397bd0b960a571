"""Prepare a step: check everything, choose backends, complete the states. Checks come before changes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._groups.buffers import FlatBuffer
from dragon.vm.torch.optim._groups.checks import check_grads, check_memory, has_memory, has_own_memory
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup, Signature
from dragon.vm.torch.optim._groups.layout import is_stray
from dragon.vm.torch.optim._groups.masters import reconcile
from dragon.vm.torch.optim._groups.states import State
from dragon.vm.torch.optim._groups.storage import first_index
from dragon.vm.torch.optim._modes import check_transforms
from dragon.vm.torch.optim._plan.completion import completed_states
from dragon.vm.torch.optim._plan.joining import Joined, join, part_counters
from dragon.vm.torch.optim._plan.recipe import Chosen, Recipe


class Prepared(NamedTuple):
    """The tensors of a step. Lists have one element a parameter.

    Attributes:
        chosen: the parameters; where a gradient is None, a tensor stands for it that is laid out like it.
        keys: names of each one's state entries that the step reads or writes.
        flattened: entries that share a launch, in order of first appearance; positions from ``len(keys)`` on are
            those of `joined`.
        joined: flat buffers.
        inside: positions of their parameters.
        strays: positions of gradients that must be copied into their parameters' layout.
        are_opaque: whether some tensor has no memory of its own, so that nothing can be guarded.
    """

    chosen: Chosen
    keys: list[tuple[str, ...]]
    flattened: list[FlattenedGroup]
    joined: list[Joined]
    inside: set[int]
    strays: list[int]
    are_opaque: bool


def prepare(recipe: Recipe, chosen: Chosen, *, are_captured: bool) -> Prepared:
    """Prepare a step of parameters.

    Missing states are added to the recipe's, and buffers whose parameters part are taken out. A gradient is None
    for a parameter of an earlier step that takes no part in this one. `are_captured` tells whether a graph was
    captured of some plan.

    Raises:
        RuntimeError, ValueError: for gradients or parameters that cannot be updated. Nothing has changed then.
    """
    check_transforms()
    params, shards = chosen.params, chosen.shards
    # The gradient of a parameter is laid out like it, until another is seen.
    grads: list[Tensor] = [
        shard.detach() if grad is None else grad for shard, grad in zip(shards, chosen.grads, strict=True)
    ]
    chosen = chosen._replace(grads=grads)
    check_grads(shards, grads, recipe.owner)
    solid = [i for i, shard in enumerate(shards) if has_memory(shard) and has_own_memory(type(grads[i]))]
    check_memory([params[i] for i in solid], recipe.param_groups)
    states, signatures = completed_states(recipe, chosen)
    joined, parted, inside = join(recipe, chosen, states, signatures)
    part_counters([state for i, state in enumerate(states) if i not in inside])
    if parted and are_captured:
        raise RuntimeError(
            "with flatten=True a step needs all parameters of a buffer once a graph was captured: its replays "
            "count their steps together. Give each a gradient, or leave flatten=False"
        )
    # Everything is checked: from here on things change.
    # Since the last step somebody may have loaded the parameters, or given them other memory. Elements that are
    # not nearest to an fp32 master of an earlier step become their own masters.
    pairs = zip(params, states, strict=True)
    held = {param: state for param, state in pairs if "param_master" in recipe.state.get(param, {})}
    reconcile(list(held), held)
    _commit(recipe, params, states, parted)
    entries: dict[Signature, list[Entry]] = {}
    for i, signature in enumerate(signatures):
        if i not in inside:
            first = first_index(params[i]) if signature.is_stochastic else 0
            state = {key: local(value) for key, value in states[i].items()}
            entry = Entry(shards[i], state, chosen.group_index[i], i, first)
            entries.setdefault(signature, []).append(entry)
    for i, member in enumerate(joined, len(params)):
        entry = Entry(member.buffer.values, member.buffer.state, member.group_index, i)
        entries.setdefault(signatures[member.positions[0]], []).append(entry)
    keys_of = {signature: signature.all_keys for signature in set(signatures)}
    return Prepared(
        chosen,
        [keys_of[signature] for signature in signatures],
        [FlattenedGroup(*item) for item in entries.items()],
        joined,
        inside,
        [i for i in solid if i not in inside and is_stray(shards[i], grads[i])],
        len(solid) < len(params),
    )


def _commit(recipe: Recipe, params: list[Tensor], states: list[State], parted: list[FlatBuffer]) -> None:
    """Give the optimizer the states, and take the buffers out whose parameters part."""
    for param, state in zip(params, states, strict=True):
        if state or recipe.state.get(param):
            held = recipe.state[param]
            held.update(state)
            for key in held.keys() - state.keys():
                del held[key]
    if parted:
        together = {id(buffer.state.get("step")) for buffer in recipe.buffers if buffer not in parted}
        every = [state for state in recipe.state.values() if isinstance(state, dict)]
        part_counters([state for state in every if id(state.get("step")) not in together])
        for param, state in zip(params, states, strict=True):
            if state:
                state.update(recipe.state[param])
    # Last: whatever interrupts this, no counter stays shared without a buffer.
    for buffer in parted:
        recipe.buffers.remove(buffer)
