"""Which flat buffers are updated as one tensor in a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from dragon.vm.torch.optim._groups.buffers import Joined, take_states
from dragon.vm.torch.optim._groups.flattening import Signature
from dragon.vm.torch.optim._groups.states import State
from dragon.vm.torch.optim._plan.recipe import Chosen, Recipe


def join(
    recipe: Recipe, chosen: Chosen, states: Sequence[State], signatures: Sequence[Signature]
) -> dict[Signature, list[Joined]]:
    """Buffers whose parameters step together, by what these have in common.

    Their states become pieces of the buffers'. `states` are complete, and changed in their places.
    """
    joined: dict[Signature, list[Joined]] = {}
    for buffer in recipe.buffers:
        positions = buffer.positions(chosen.shards)
        if positions is not None and _step_together(recipe, chosen, positions, signatures):
            joined.setdefault(signatures[positions[0]], []).append(Joined(buffer, positions))
    # All at once: a state may be the place of a parameter of another buffer.
    every = list(chain.from_iterable(joined.values()))
    inside = set(chain.from_iterable(positions for _, positions in every))
    others = [state for i, state in enumerate(states) if i not in inside] if every else []
    members = [(buffer, [states[i] for i in positions]) for buffer, positions in every]
    keys = [signatures[positions[0]].tensor_keys for _, positions in every]
    for (_, positions), replaced in zip(every, take_states(members, keys, others), strict=True):
        for position, entries in zip(positions, replaced, strict=True):
            states[position].update(entries)
    return joined


def _step_together(recipe: Recipe, chosen: Chosen, positions: list[int], signatures: Sequence[Signature]) -> bool:
    signature, group_index = signatures[positions[0]], chosen.group_index[positions[0]]
    return (
        # What one of torch's fused operations updates.
        signature.backend == "native"
        and signature.is_uniform
        and all(signatures[i] == signature and chosen.group_index[i] == group_index for i in positions)
        # Each gradient is clipped on its own.
        and not recipe.groups[group_index]["clip_norm"]
    )
