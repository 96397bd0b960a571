"""What the states of a step's parameters will be, and who updates each: nothing is changed yet."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._formats.resolve import Storage
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._groups.checks import check_state, has_memory, has_own_memory
from dragon.vm.torch.optim._groups.eligibility import choose_backend, counter_place
from dragon.vm.torch.optim._groups.entries import decode_entry, held_format, kept_format, stored_entries, unwalked
from dragon.vm.torch.optim._groups.flattening import Signature
from dragon.vm.torch.optim._groups.native import parts_of
from dragon.vm.torch.optim._groups.saved import misfit, with_saved_remainder
from dragon.vm.torch.optim._groups.states import CounterPlace, State, add_counters, begun_average, settled_entries
from dragon.vm.torch.optim._groups.storage import storage_of
from dragon.vm.torch.optim._plan.recipe import Chosen, Recipe


def completed_states(recipe: Recipe, chosen: Chosen) -> tuple[list[State], list[Signature]]:
    """For each parameter its state, complete and settled, and what it must have in common with others.

    Raises:
        ValueError: for a state that does not fit its parameter, and for one that no backend can update.
    """
    algorithm = recipe.algorithm
    states: list[State] = []
    signatures: list[Signature] = []
    counted: list[tuple[State, float, CounterPlace]] = []
    for _, param, shard, grad, index in zip(*chosen, strict=True):
        group, held = recipe.groups[index], recipe.state.get(param, {})
        # PyTorch's SGD takes None for a buffer that is still to begin.
        optional = algorithm.optional_keys(group)
        held = {key: value for key, value in held.items() if value is not None or key not in optional}
        check_state(param, held, algorithm.all_state_keys(group), algorithm.counts_steps(group))
        _check_whole(param, held, set(algorithm.state_keys(group)) - optional)
        if parts_of(held):
            held = with_saved_remainder(held, group)
            if found := misfit(param, held, algorithm.state_keys(group)):
                raise ValueError(
                    f"the state of a parameter of shape {tuple(param.shape)} and {param.dtype} has {found}"
                )
        storage = storage_of(param, group, algorithm.state_keys(group))
        signature = _signature(recipe, shard, grad, held, storage, group)
        signatures.append(signature)
        added, replaced = stored_entries(param, held, storage, algorithm.state_keys(group))
        states.append({**{key: value for key, value in held.items() if key not in replaced}, **added})
        if signature.ema_dtype is not None and "ema" not in held:
            master = decode_entry(param, states[-1], "param", storage.param)
            states[-1]["ema"] = begun_average(param, unwalked(shard, master), signature.ema_dtype)
        # An average may have begun before the first step that counts.
        has_begun = any(held_format(held, name) is not None for name in signature.state_keys)
        if signature.counts_steps and ("step" not in held or not (has_begun or algorithm.saves_steps)):
            count = (algorithm.uncounted_steps or 0.0) if has_begun else 0.0
            # In front, where PyTorch's stands.
            states[-1] = {"step": None, **states[-1]}
            counted.append((states[-1], count, counter_place(param, signature.backend, group)))
    add_counters(counted)
    keys_of = {signature: signature.tensor_keys for signature in set(signatures)}
    for param, index, state, signature in zip(chosen.params, chosen.group_index, states, signatures, strict=True):
        counter = counter_place(param, signature.backend, recipe.groups[index]) if signature.counts_steps else None
        state.update(settled_entries(param, state, keys_of[signature], counter))
    _give_streams(recipe, chosen.params, states, signatures)
    return states, signatures


def _check_whole(param: Tensor, state: State, moments: set[str]) -> None:
    """Check that a state which has begun has its moments, but for a maximum that was switched on since.

    Raises:
        ValueError: if one is missing. Beside the others it would be far too small if it began now.
    """
    needed = moments - {"max_exp_avg_sq"}
    missing = {name for name in needed if held_format(state, name) is None}
    if missing and (missing != needed or float(state.get("step") or 0) > 0):
        raise ValueError(
            f"the state of a parameter of shape {tuple(param.shape)} has no {min(missing)}: it has "
            f"{', '.join(map(str, state))}"
        )


def _signature(
    recipe: Recipe, shard: Tensor, grad: Tensor, state: State, storage: Storage, group: dict[str, Any]
) -> Signature:
    """What a parameter must have in common with others, once its state is complete."""
    algorithm, names = recipe.algorithm, recipe.algorithm.state_keys(group)
    formats = tuple(kept_format(storage, state, name) for name in names)
    average = None
    if group["ema_decay"]:
        average = state["ema"].dtype if "ema" in state else storage.average
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


def _give_streams(recipe: Recipe, params: list[Tensor], states: list[State], signatures: list[Signature]) -> None:
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
