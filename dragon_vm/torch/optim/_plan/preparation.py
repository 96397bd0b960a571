"""Prepare a step: check everything, choose backends, complete the states. Checks come before changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._groups.buffers import Joined
from dragon.vm.torch.optim._groups.checks import check_grads, check_memory, has_memory, has_own_memory
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup, Signature
from dragon.vm.torch.optim._groups.layout import is_stray
from dragon.vm.torch.optim._groups.masters import reconcile
from dragon.vm.torch.optim._groups.states import State, part_counters
from dragon.vm.torch.optim._groups.storage import first_index
from dragon.vm.torch.optim._modes import check_transforms
from dragon.vm.torch.optim._plan.completion import completed_states
from dragon.vm.torch.optim._plan.joining import join
from dragon.vm.torch.optim._plan.recipe import Chosen, Recipe


class Prepared(NamedTuple):
    """The tensors of a step. Lists have one element a parameter.

    Attributes:
        chosen: the parameters; where a gradient is None, a tensor stands for it that is laid out like it.
        keys: names of each one's state entries that the step reads or writes.
        flattened: entries that share a launch, in order of first appearance.
        strays: positions of gradients that must be copied into their parameters' layout.
        are_opaque: whether some tensor has no memory of its own, so that nothing can be guarded.
    """

    chosen: Chosen
    keys: list[tuple[str, ...]]
    flattened: list[FlattenedGroup]
    strays: list[int]
    are_opaque: bool


def prepare(recipe: Recipe, chosen: Chosen) -> Prepared:
    """Prepare a step of parameters.

    Missing states are added to the recipe's, and buffers that their parameters have left are taken out. A gradient
    is None for a parameter of an earlier step that takes no part in this one.

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
    joined = join(recipe, chosen, states, signatures)
    part_counters(states)
    # Everything is checked: from here on things change.
    # Since the last step somebody may have loaded the parameters, or given them other memory. Elements that are
    # not nearest to an fp32 master of an earlier step become their own masters.
    pairs = zip(params, states, strict=True)
    held = {param: state for param, state in pairs if "param_master" in recipe.state.get(param, {})}
    reconcile(list(held), held)
    _commit(recipe, params, states)
    entries: dict[Signature, list[Entry]] = {}
    for i, signature in enumerate(signatures):
        first = first_index(params[i]) if signature.is_stochastic else 0
        state = {key: local(value) for key, value in states[i].items()}
        entry = Entry(shards[i], state, chosen.group_index[i], i, first)
        entries.setdefault(signature, []).append(entry)
    keys_of = {signature: signature.all_keys for signature in set(signatures)}
    return Prepared(
        chosen,
        [keys_of[signature] for signature in signatures],
        [FlattenedGroup(*item, _among(item[1], joined.get(item[0], ()))) for item in entries.items()],
        [i for i in solid if is_stray(shards[i], grads[i])],
        len(solid) < len(params),
    )


def _among(entries: list[Entry], joined: Sequence[Joined]) -> list[Joined]:
    """Flat buffers with the places of their parameters among entries."""
    row_of = {entry.position: row for row, entry in enumerate(entries)} if joined else {}
    return [each._replace(positions=[row_of[position] for position in each.positions]) for each in joined]


def _commit(recipe: Recipe, params: list[Tensor], states: list[State]) -> None:
    """Give the optimizer the states, and take the buffers out that their parameters have left."""
    for param, state in zip(params, states, strict=True):
        if state or recipe.state.get(param):
            held = recipe.state[param]
            held.update(state)
            for key in held.keys() - state.keys():
                del held[key]
    recipe.buffers[:] = [each for each in recipe.buffers if each.positions(recipe.members.shards) is not None]
