"""Prepare a step: check everything, choose backends, complete the states. Checks come before changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import is_distributed, local_state
from dragon.vm.torch.optim._formats import Plain, Storage
from dragon.vm.torch.optim._groups.buffers import FlatBuffer
from dragon.vm.torch.optim._groups.checks import check_grads, check_memory, check_state, has_memory, labels
from dragon.vm.torch.optim._groups.eligibility import choose_backend, step_device
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup, Signature, State, flatten_groups
from dragon.vm.torch.optim._groups.layout import is_dense, lies_like
from dragon.vm.torch.optim._groups.members import has_own_memory
from dragon.vm.torch.optim._groups.states import missing_states, settled_entries
from dragon.vm.torch.optim._groups.storage import first_index, kept_format, storage_of, stored_entries
from dragon.vm.torch.optim._plan.joining import Joined, join, part_counters
from dragon.vm.torch.optim._plan.recipe import Recipe


class Prepared(NamedTuple):
    """The tensors of a step. Lists have one element a parameter with a gradient.

    Attributes:
        params: parameters.
        shards: for each the tensor that this process updates.
        grads: their gradients, likewise.
        group_index: index of each one's parameter group.
        keys: names of each one's state entries that the step reads or writes.
        flattened: entries that share a launch; positions from ``len(params)`` on are those of `joined`.
        joined: flat buffers.
        strays: positions of gradients that must be copied into their parameters' layout.
        among_all: positions of the parameters among all of the optimizer.
        are_distributed: whether some parameter is distributed.
        are_opaque: whether some tensor has no memory of its own, so that nothing can be guarded.
    """

    params: list[Tensor]
    shards: list[Tensor]
    grads: list[Tensor]
    group_index: list[int]
    keys: list[tuple[str, ...]]
    flattened: list[FlattenedGroup]
    joined: list[Joined]
    strays: list[int]
    among_all: list[int]
    are_distributed: bool
    are_opaque: bool


def prepare(
    recipe: Recipe,
    params: list[Tensor],
    shards: list[Tensor],
    grads: list[Tensor],
    group_index: list[int],
    among_all: list[int],
) -> Prepared:
    """Prepare a step.

    Args:
        recipe: what the optimizer is; missing states are added to it, buffers whose parameters part are taken out.
        params: parameters with a gradient.
        shards: for each the tensor that this process updates.
        grads: their gradients, likewise.
        group_index: index of each one's parameter group.
        among_all: positions of the parameters among all of the optimizer.

    Raises:
        RuntimeError, ValueError: for gradients or parameters that cannot be updated. Nothing has changed then.
    """
    check_grads(shards, grads, recipe.owner)
    solid = [i for i, (shard, grad) in enumerate(zip(shards, grads, strict=True)) if _has_memory(shard, grad)]
    check_memory(
        [shards[i] for i in solid],
        lambda: [labels(recipe.param_groups)[among_all[position]] for position in solid],
    )
    states, signatures = _with_states(recipe, params, shards, grads, group_index)
    joined, parted = join(recipe, shards, grads, group_index, states, signatures)
    inside = {position for member in joined for position in member.positions}
    outside = [states[i] for i in range(len(params)) if i not in inside]
    part_counters(outside)
    if parted and recipe.are_captured:
        raise RuntimeError(
            "with flatten=True a step needs all parameters of a buffer once a graph was captured: its replays "
            "count their steps together. Give each a gradient, or leave flatten=False"
        )
    # Everything is checked: from here on things change.
    _commit(recipe, params, states, joined, parted)
    entries, chosen_signatures = [], []
    for i in range(len(params)):
        if i not in inside:
            first = first_index(params[i]) if signatures[i].is_stochastic else 0
            entries.append(Entry(shards[i], local_state(states[i]), group_index[i], i, first))
            chosen_signatures.append(signatures[i])
    for i, member in enumerate(joined):
        entries.append(Entry(member.buffer.values, member.buffer.state, member.group_index, len(params) + i))
        chosen_signatures.append(signatures[member.positions[0]])
    keys_of = {signature: signature.all_keys for signature in set(signatures)}
    strays = [i for i in solid if i not in inside and is_dense(shards[i]) and not _walks(shards[i], grads[i])]
    return Prepared(
        params,
        shards,
        grads,
        group_index,
        [keys_of[signature] for signature in signatures],
        flatten_groups(entries, chosen_signatures),
        joined,
        strays,
        among_all,
        any(map(is_distributed, params)),
        len(solid) < len(params),
    )


def _commit(
    recipe: Recipe,
    params: Sequence[Tensor],
    states: Sequence[State],
    joined: Sequence[Joined],
    parted: Sequence[FlatBuffer],
) -> None:
    """Give the optimizer the states, and take the buffers out whose parameters part."""
    for param, state in zip(params, states, strict=True):
        if state:
            held = recipe.state[param]
            held.update(state)
            for key in held.keys() - state.keys():
                del held[key]
    if parted:
        together = {id(member.buffer.state.get("step")) for member in joined}
        every = [state for state in recipe.state.values() if isinstance(state, dict)]
        part_counters([state for state in every if id(state.get("step")) not in together])
        for param, state in zip(params, states, strict=True):
            if state:
                state.update(recipe.state[param])
    for buffer in parted:
        recipe.buffers.remove(buffer)


def _has_memory(shard: Tensor, grad: Tensor) -> bool:
    return has_memory(shard) and has_own_memory(type(grad))


def _walks(param: Tensor, grad: Tensor) -> bool:
    return lies_like(grad, param) and not grad.is_conj() and not grad.is_neg()


def _with_states(
    recipe: Recipe,
    params: Sequence[Tensor],
    shards: Sequence[Tensor],
    grads: Sequence[Tensor],
    group_index: Sequence[int],
) -> tuple[list[State], list[Signature]]:
    """For each parameter its state, complete and settled, and what it must have in common with others."""
    algorithm = recipe.algorithm
    groups = [recipe.groups[index] for index in group_index]
    held: list[State] = [recipe.state.get(param, {}) for param in params]
    for param, state, group in zip(params, held, groups, strict=True):
        check_state(param, state, algorithm.all_state_keys(group), algorithm.counts_steps(group))
    storages = [
        storage_of(param, group, algorithm.state_keys(group)) for param, group in zip(params, groups, strict=True)
    ]
    # Equal ones are one object: what follows from it is computed once.
    distinct: dict[Signature, Signature] = {}
    signatures = []
    for shard, grad, state, storage, group in zip(shards, grads, held, storages, groups, strict=True):
        signature = _signature(recipe, shard, grad, state, storage, group)
        signatures.append(distinct.setdefault(signature, signature))
    devices = [
        step_device(param, signature.backend, group) if signature.counts_steps else None
        for param, signature, group in zip(params, signatures, groups, strict=True)
    ]
    averages = [
        signature.ema_dtype if group["ema_decay"] else None
        for signature, group in zip(signatures, groups, strict=True)
    ]
    keys_of = {id(signature): signature.tensor_keys for signature in distinct}
    names = [keys_of[id(signature)] for signature in signatures]
    added = missing_states(params, held, names, devices, averages, algorithm.uncounted_steps)
    states = []
    for param, state, storage, new, group in zip(params, held, storages, added, groups, strict=True):
        entries, replaced = stored_entries(param, state, storage, algorithm.state_keys(group))
        kept = {key: value for key, value in state.items() if key not in replaced}
        states.append({**kept, **entries, **new})
    for param, state, keys, device in zip(params, states, names, devices, strict=True):
        state.update(settled_entries(param, state, keys, device))
    _give_streams(recipe, params, states, signatures)
    return states, signatures


def _signature(
    recipe: Recipe, shard: Tensor, grad: Tensor, state: State, storage: Storage, group: dict[str, Any]
) -> Signature:
    """What a parameter must have in common with others, once its state is complete."""
    algorithm, names = recipe.algorithm, recipe.algorithm.state_keys(group)
    formats = tuple(kept_format(storage.states[name], state, name) for name in names)
    average = None
    if group["ema_decay"]:
        average = state["ema"].dtype if "ema" in state else storage.average.parts[0].dtype
    plain = {form.dtype for form in formats if isinstance(form, Plain)} | ({average} if average else set())
    signature = Signature(
        *("", shard.device, shard.dtype, grad.dtype, names, formats, average, algorithm.counts_steps(group)),
        None if isinstance(storage.param, Plain) else storage.param,
    )
    is_eager = group["differentiable"] or not has_own_memory(type(grad))
    if not signature.is_plain and not has_memory(shard):
        raise ValueError(
            "state_dtype, stochastic_rounding and master_weights need parameters with memory of their own, "
            f"but got one of type {type(shard).__name__} on {shard.device}"
        )
    backend = choose_backend(
        recipe.settings.backend, shard, grad.dtype, plain, is_eager, in_parts=not signature.is_plain
    )
    return signature._replace(backend=backend)


def _give_streams(
    recipe: Recipe, params: Sequence[Tensor], states: Sequence[State], signatures: Sequence[Signature]
) -> None:
    """Give each state that needs random words a number of its own: at first its parameter's position.

    It is a Python int: PyTorch's loader casts every tensor of a state. A position that is in use elsewhere is
    replaced by a number that is no position: loaded states without a number are still to get theirs.
    """
    new = [i for i, signature in enumerate(signatures) if signature.is_stochastic and "stream" not in states[i]]
    if not new:
        return
    every = chain.from_iterable(group["params"] for group in recipe.param_groups)
    positions = {id(param): position for position, param in enumerate(every)}
    taken = {held["stream"] for held in recipe.state.values() if isinstance(held, dict) and "stream" in held}
    for i in new:
        stream = positions[id(params[i])]
        states[i]["stream"] = 1 + max(*taken, *positions.values()) if stream in taken else stream
        taken.add(states[i]["stream"])


def outside_inference_mode(run: Callable[[], Any]) -> Any:
    """Call `run` such that tensors it makes can be written to later, whatever mode that is in."""
    if not torch.is_inference_mode_enabled():
        return run()
    with torch.inference_mode(False), torch.no_grad():
        return run()
