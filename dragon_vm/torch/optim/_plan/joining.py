"""Which flat buffers are updated as one tensor in a step."""

from __future__ import annotations

from collections.abc import Sequence

from dragon.vm.torch.optim._groups.buffers import Joined
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
        if positions is None or not _step_together(recipe, chosen, positions, signatures):
            continue
        signature = signatures[positions[0]]
        replaced = buffer.take_states([states[i] for i in positions], signature.tensor_keys)
        for position, entries in zip(positions, replaced, strict=True):
            states[position].update(entries)
        joined.setdefault(signature, []).append(Joined(buffer, positions, dict(buffer.flat_tensors())))
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
