"""The formats of a parameter, and the entries of its state that hold its values."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from dragon.vm.torch.optim._distributed.shards import distributed_like, is_distributed, local
from dragon.vm.torch.optim._formats import (
    BLOCK,
    Format,
    Plain,
    SignedQ8,
    Split8,
    SquareQ8,
    StochasticBfloat16,
    Storage,
    StorageOptions,
    check_options,
    resolve,
)
from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense
from dragon.vm.torch.optim._groups.states import zeros_for

State = dict[str, Any]
EIGHT_BIT = "8bit"


def options_of(group: Mapping[str, Any]) -> StorageOptions:
    """The storage options of a parameter group."""
    return StorageOptions(*(group[name] for name in StorageOptions._fields))


def check_storage(group: Mapping[str, Any], states: Sequence[str] | None = None) -> None:
    """Check the storage options of a group, and those of its parameters that have a shape by now.

    Raises:
        ValueError: for a value out of range, and for one that does not fit a parameter.
    """
    check_options(options_of(group))
    for index, param in enumerate(group.get("params", ())):
        if param.requires_grad and not torch.nn.parameter.is_lazy(param):
            try:
                storage_of(param, group, states or ())
            except ValueError as error:
                names = group.get("param_names")
                which = f"parameter {index} of the group" + (f" ({names[index]})" if names else "")
                raise ValueError(f"{error}, for {which}") from None


def storage_of(param: Tensor, group: Mapping[str, Any], states: Sequence[str]) -> Storage:
    """The formats of a parameter, by its global shape and its group's options.

    Raises:
        ValueError: the options do not fit the parameter.
    """
    options = options_of(group)
    asked = options.state_dtype
    if param.is_complex() and isinstance(asked, torch.dtype):
        options = options._replace(state_dtype=None)
    storage = resolve(options, param.dtype, param.shape, states, differentiable=group["differentiable"])
    if not states and isinstance(asked, torch.dtype) and not param.is_complex():
        storage = storage._replace(average=Plain(asked))
    if any(len(form.parts) > 1 for form in storage.states.values()) and not _has_whole_blocks(param):
        storage = resolve(_without_blocks(options), param.dtype, param.shape, states)
    return storage


def _without_blocks(options: StorageOptions) -> StorageOptions:
    asked = options.state_dtype
    if isinstance(asked, Mapping):
        kept = {name: torch.float32 if value == EIGHT_BIT else value for name, value in asked.items()}
        return options._replace(state_dtype=kept)
    return options._replace(state_dtype=torch.float32)


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
    shape, (chunk,) = param.shape, param.__create_chunk_list__()
    offsets = chunk.offsets
    return sum(offset * shape[dim + 1 :].numel() for dim, offset in enumerate(offsets))


def flat(tensor: Tensor) -> Tensor:
    """A view of a dense tensor in walking order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def walker(shard: Tensor) -> Callable[[Tensor], Tensor]:
    """What turns a tensor that is laid out as a parameter is into the order in which it is walked."""
    return flat if is_dense(shard) else lambda tensor: tensor


def part_keys(name: str, form: Format) -> tuple[str, ...]:
    """Names in a state of the tensors that hold a value; a parameter's own tensor has none."""
    parts = form.parts[1:] if name == "param" else form.parts
    return tuple(name + part.suffix for part in parts)


def nearest(form: Format) -> Format:
    """The format without random rounding, in the same tensors."""
    if isinstance(form, StochasticBfloat16):
        return Plain(torch.bfloat16)
    if isinstance(form, SquareQ8):
        return SquareQ8(False)
    return Split8(False) if isinstance(form, Split8) else form


def held_format(state: Mapping[str, Any], name: str) -> Format | None:
    """How a state is stored now; None if it is not there."""
    if isinstance(state.get(name), Tensor):
        return Plain(state[name].dtype)
    codes = state.get(f"{name}_q8")
    if not isinstance(codes, Tensor):
        return None
    return SignedQ8() if codes.dtype == torch.int8 else SquareQ8(False)


def kept_format(form: Format, state: Mapping[str, Any], name: str) -> Format:
    """The wanted format; a state that is plain already keeps its dtype if a plain one is wanted."""
    held = held_format(state, name)
    return held if isinstance(form, Plain) and isinstance(held, Plain) else form


def make_parts(param: Any, name: str, form: Format) -> State:
    """Zeroed tensors for a value of a parameter, which are distributed as it is."""
    shard = local(param)
    made: State = {}
    parts = form.parts[1:] if name == "param" else form.parts
    for key, part in zip(part_keys(name, form), parts, strict=True):
        if part.elements == 1:
            made[key] = distributed_like(param, zeros_for(shard, part.dtype))
        else:
            scale = torch.zeros(part.shape(shard.shape), dtype=part.dtype, device=shard.device)
            made[key] = _distributed_scale(param, scale, part.shape(param.shape))
    return made


def _distributed_scale(param: Any, scale: Tensor, shape: Size) -> Tensor:
    """Scales as a `DTensor` with the placements of a parameter, if it is one."""
    if not is_distributed(param):
        return scale
    spec = copy.copy(param._spec)
    strides = (shape[1], 1)
    spec.tensor_meta = spec.tensor_meta._replace(shape=shape, stride=strides, dtype=scale.dtype)
    module: Any = sys.modules["torch.distributed.tensor"]
    distributed: Tensor = module.DTensor(scale, spec, requires_grad=False)
    return distributed


def decode_entry(param: Tensor, state: Mapping[str, Any], name: str, form: Format) -> Tensor:
    """A value of a state or the master of a parameter, in walking order; it may be a view of the entry."""
    shard = local(param)
    own, walk = [shard.detach()] if name == "param" else [], walker(shard)
    parts = [walk(part) for part in (*own, *(local(state[key]) for key in part_keys(name, form)))]
    return form.decode(parts)


def encode_entry(value: Tensor, param: Tensor, entries: Mapping[str, Any], name: str, form: Format) -> None:
    """Round a value to nearest, and write it to its entries; a parameter's own tensor stays as it is."""
    walk = walker(local(param))
    own = [torch.empty_like(walk(local(param).detach()))] if name == "param" else []
    parts = [walk(local(entries[key])) for key in part_keys(name, form)]
    nearest(form).encode(value, [*own, *parts])


def unflat(param: Any, value: Tensor) -> Tensor:
    """A value in walking order as a tensor that is laid out and distributed as the parameter is."""
    shard = local(param)
    if is_dense(shard):
        value = value.as_strided(shard.shape, shard.stride())
    return distributed_like(param, value)


@torch.no_grad()
def stored_entries(
    param: Tensor, state: Mapping[str, Any], storage: Storage, names: Iterable[str]
) -> tuple[State, set[str]]:
    """The entries that a state lacks in its formats, converted from those that it has. Nothing is changed.

    Args:
        param: the parameter.
        state: its state, complete or not.
        storage: the formats.
        names: of the states that must be there.

    Returns:
        Entries to add, and names of those that they replace.
    """
    added: State = {}
    replaced: set[str] = set()
    for name in names:
        form = kept_format(storage.states[name], state, name)
        held = held_format(state, name)
        keys = part_keys(name, form)
        if held is not None and part_keys(name, held) == keys and _are_stored(form, state, keys):
            continue
        entries = make_parts(param, name, form)
        if held is not None:
            source = _settled(param, state, part_keys(name, held))
            encode_entry(decode_entry(param, source, name, held).float(), param, entries, name, form)
            replaced |= set(part_keys(name, held)) - set(keys)
        added |= entries
    keys = part_keys("param", storage.param)
    if keys and not _are_stored(storage.param, state, keys, is_param=True):
        entries = make_parts(param, "param", storage.param)
        if keys == ("param_master",):
            local(entries["param_master"]).copy_(local(param).detach())
        added |= entries
    replaced |= {key for key in ("param_remainder", "param_master") if key in state and key not in keys}
    return added, replaced


def _are_stored(form: Format, state: Mapping[str, Any], keys: Sequence[str], is_param: bool = False) -> bool:
    parts = form.parts[1:] if is_param else form.parts
    return all(
        isinstance(state.get(key), Tensor) and local(state[key]).dtype == part.dtype
        for key, part in zip(keys, parts, strict=True)
    )


def _settled(param: Tensor, state: Mapping[str, Any], keys: Sequence[str]) -> State:
    """Entries on the parameter's device; those of its shape in its layout."""
    shard, found = local(param), {}
    for key in keys:
        value = local(state[key]).to(shard.device)
        same = value.shape == shard.shape and has_memory(shard) and is_dense(shard)
        found[key] = in_layout_of(shard, value) if same else value
    return found
