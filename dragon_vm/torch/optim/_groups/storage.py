"""The formats of a parameter: by its group's options, its global shape, and how it lies in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import is_distributed, local
from dragon.vm.torch.optim._formats.format import BLOCK
from dragon.vm.torch.optim._formats.resolve import EIGHT_BIT, Storage, StorageOptions, check_options, resolve
from dragon.vm.torch.optim._groups.checks import is_trained, names_of
from dragon.vm.torch.optim._groups.layout import is_dense


def options_of(group: Mapping[str, Any]) -> StorageOptions:
    """The storage options of a parameter group."""
    return StorageOptions(*(group[name] for name in StorageOptions._fields))


def check_storage(group: Mapping[str, Any], states: Sequence[str]) -> None:
    """Check the storage options of a group, and those of its parameters that have a shape by now.

    Raises:
        ValueError: for a value out of range, and for one that does not fit a parameter.
    """
    check_options(options_of(group))
    for index, param in enumerate(group.get("params", ())):
        if is_trained(param):
            try:
                storage_of(param, group, states)
            except ValueError as error:
                name = names_of(group)[index]
                which = f"parameter {index} of the group" + (f" ({name})" if name else "")
                raise ValueError(f"{error}, for {which}") from None


def storage_of(param: Tensor, group: Mapping[str, Any], states: Sequence[str]) -> Storage:
    """The formats of a parameter, by its global shape and its group's options.

    Raises:
        ValueError: the options do not fit the parameter.
    """
    options = options_of(group)
    if param.is_complex():
        # Their states have their dtype; 8 bits are refused.
        options = options.changed(lambda value: value if value == EIGHT_BIT else None)
    storage = resolve(options, param.dtype, param.shape, states, differentiable=group["differentiable"])
    if any(len(form.parts) > 1 for form in storage.states.values()) and not _has_whole_blocks(param):
        options = options.changed(lambda value: torch.float32 if value == EIGHT_BIT else value)
        storage = resolve(options, param.dtype, param.shape, states)
    return storage


def _has_whole_blocks(param: Any) -> bool:
    """Whether each row is whole blocks in memory, here and in every process that holds a part of it."""
    if not is_dense(local(param)) or not rows_are_outermost(param):
        return False
    if not is_distributed(param):
        return True
    columns = 1
    for placement, size in zip(param.placements, param.device_mesh.shape, strict=True):
        # Rows may be cut in any way, also by FSDP2 within tensor parallelism.
        if placement.is_replicate() or getattr(placement, "dim", None) == 0:
            continue
        if not placement.is_shard(1) or param.ndim != 2:
            return False
        columns *= size
    return bool(param.shape[-1] % (BLOCK * columns) == 0) or columns == 1


def rows_are_outermost(param: Tensor) -> bool:
    """Whether walking the memory walks dimension 0 last."""
    return param.ndim == 0 or param.shape[0] <= 1 or param.stride(0) == param.shape[1:].numel()


def first_index(param: Any) -> int:
    """Global index, in walking order, of the first element that this process holds.

    It is exact where dimension 0 alone is cut; else it is some number that the mesh decides.
    """
    if not is_distributed(param) or not rows_are_outermost(param):
        return 0
    (chunk,) = param.__create_chunk_list__()
    return sum(offset * param.shape[dim + 1 :].numel() for dim, offset in enumerate(chunk.offsets))
