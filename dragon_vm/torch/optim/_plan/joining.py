"""Which flat buffers are updated as one entry in a step, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._backends.selection import Gathered, Picker, picker
from dragon.vm.torch.optim._groups.buffers import FlatBuffer, gather, take_states
from dragon.vm.torch.optim._groups.flattening import Signature
from dragon.vm.torch.optim._groups.layout import is_stray
from dragon.vm.torch.optim._groups.states import State
from dragon.vm.torch.optim._plan.recipe import Chosen, Recipe


class Joined(NamedTuple):
    """The parameters of a flat buffer, which are updated as one entry.

    Attributes:
        positions: of its parameters among all gathered.
        pick: selects its parameters among all gathered.
        group_index: of the parameter group.
        strays: indices in `positions` of gradients that are laid out otherwise than their parameters.
    """

    buffer: FlatBuffer
    positions: list[int]
    pick: Picker
    group_index: int
    strays: list[int]


def join(
    recipe: Recipe, chosen: Chosen, states: Sequence[State], signatures: Sequence[Signature]
) -> tuple[list[Joined], list[FlatBuffer], set[int]]:
    """Buffers whose parameters step together, buffers that part for good, and the positions of the former's."""
    joined: list[Joined] = []
    parted: list[FlatBuffer] = []
    members = []
    for buffer in recipe.buffers:
        positions = buffer.positions(chosen.shards)
        if positions is not None and _step_together(recipe, chosen, positions, signatures):
            signature = signatures[positions[0]]
            keys = [key for key in signature.all_keys if key != "step"]
            own = [states[i] for i in positions]
            # On an accelerator this waits for the device.
            counts = {float(state["step"]) for state in own} if signature.counts_steps else set()
            if len(counts) <= 1:
                members.append((buffer, own, keys, signature.counts_steps))
                pick = picker(positions, len(states))
                pairs = [(chosen.shards[i], chosen.grads[i]) for i in positions]
                strays = [index for index, (shard, grad) in enumerate(pairs) if is_stray(shard, grad)]
                joined.append(Joined(buffer, positions, pick, chosen.group_index[positions[0]], strays))
                continue
        if not buffer.takes_no_part(chosen.shards, recipe.members.shards):
            parted.append(buffer)
    # All at once: a state may be the place of a parameter of another buffer.
    inside = set(chain.from_iterable(each.positions for each in joined))
    others = [state for i, state in enumerate(states) if i not in inside] if joined else []
    for each, replaced in zip(joined, take_states(members, others), strict=True):
        for position, entries in zip(each.positions, replaced, strict=True):
            states[position].update(entries)
    return joined, parted, inside


def _step_together(recipe: Recipe, chosen: Chosen, positions: list[int], signatures: Sequence[Signature]) -> bool:
    signature, group_index = signatures[positions[0]], chosen.group_index[positions[0]]
    return (
        all(chosen.group_index[i] == group_index for i in positions)
        and all(signatures[i] == signature for i in positions)
        and signature.backend != "eager"
        # Random words and blocks belong to one parameter.
        and signature.is_plain
        and signature.grad_dtype == signature.param_dtype
        # Each gradient is clipped on its own.
        and not recipe.groups[group_index]["clip_norm"]
        and not any(chosen.grads[i].requires_grad for i in positions)
    )


def part_counters(states: Sequence[State]) -> None:
    """Give states that share a step counter one each."""
    seen: set[int] = set()
    for state in states:
        counter = state.get("step")
        if isinstance(counter, Tensor):
            if id(counter) in seen:
                state["step"] = counter.clone()
            seen.add(id(counter))


def in_buffers(joined: Sequence[Joined], outside: Sequence[int], tensors: Gathered) -> Gathered:
    """The tensors of a step with the gradients of joined parameters moved into their flat buffers.

    `outside` are the positions of the other parameters.
    """
    params, grads = tensors.params, list(tensors.grads)
    members = [(each.buffer, each.pick(params), each.pick(grads), each.strays) for each in joined]
    if not gather(members, [params[position] for position in outside]):
        return tensors
    for position in outside:
        if grads[position] is not None:
            grads[position] = params[position].grad
    for each in joined:
        for position, view in zip(each.positions, each.buffer.grad_views, strict=True):
            grads[position] = view
    return tensors._replace(grads=grads)


def with_buffers(joined: Sequence[Joined], tensors: Gathered, are_own: bool) -> Gathered:
    """The tensors of a step with flat buffers behind the shards; gradients that are not `are_own` are copied."""
    buffers = [each.buffer for each in joined]
    grads = [
        each.buffer.grads if are_own else each.buffer.joined_copy(each.pick(tensors.grads)) for each in joined
    ]
    missing = [None] * len(tensors.params)
    return tensors._replace(
        shards=[*tensors.shards, *(buffer.values for buffer in buffers)],
        grads=[*tensors.grads, *grads],
        states={
            key: [*tensors.states.get(key, missing), *(buffer.state.get(key) for buffer in buffers)]
            for key in {**tensors.states, **dict.fromkeys(chain.from_iterable(b.state for b in buffers))}
        },
    )
