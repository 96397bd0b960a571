"""The entries of a state that hold the values of a parameter's states and its master, in any format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._formats.blockwise import SquareQ8
from dragon.vm.torch.optim._formats.format import Format, Part
from dragon.vm.torch.optim._formats.resolve import Storage, blockwise_format
from dragon.vm.torch.optim._formats.rounding import Plain, StochasticBfloat16
from dragon.vm.torch.optim._formats.split import Master, Split8, Split16
from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense, same_walk
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, MASTER, MASTER_PARTS, parts_of, walking_order
from dragon.vm.torch.optim._groups.states import State, zeros_for

# Formats that round to nearest, by those that round at random into the same tensors.
_NEAREST: dict[Format, Format] = {StochasticBfloat16(): Plain(torch.bfloat16), SquareQ8(True): SquareQ8(False)}


def flat(tensor: Tensor) -> Tensor:
    """A view of a dense tensor in walking order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def walked(shard: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of a shard's shape in the order in which the shard is walked; a view if it lies so."""
    return flat(in_layout_of(shard, tensor)) if has_memory(shard) and is_dense(shard) else tensor


def named_parts(name: str, form: Format) -> dict[str, Part]:
    """The parts of a value by their names in a state; a parameter's own tensor has none."""
    parts = form.parts[1:] if name == "param" else form.parts
    return {name + part.suffix: part for part in parts}


def held_format(state: Mapping[str, Any], name: str) -> Format | None:
    """How a state is stored now; None if it is not there."""
    if isinstance(state.get(name), Tensor):
        return Plain(state[name].dtype)
    return blockwise_format(name, False) if isinstance(state.get(f"{name}_q8"), Tensor) else None


def kept_format(storage: Storage, state: Mapping[str, Any], name: str) -> Format:
    """The wanted format of a state; where no dtype is asked for, one as wide as what is held or saved.

    A maximum that is still to begin is as wide as the second moments.
    """
    form, held = storage.states[name], held_format(state, name)
    if held is None and name == "max_exp_avg_sq":
        held = held_format(state, "exp_avg_sq")
    if held is None or name in storage.asked or not isinstance(form, Plain):
        return form
    return Plain(wider(held.dtype if isinstance(held, Plain) else torch.float32, form.dtype))


def wider(held: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """The wider one of two dtypes. PyTorch does not promote those of one byte, float8, which any other holds."""
    return wanted if held.itemsize == 1 else torch.promote_types(held, wanted)


def make_parts(param: Any, name: str, form: Format) -> State:
    """Zeroed tensors for a value of a parameter, which are distributed as it is."""
    shard = local(param)
    made: State = {}
    for key, part in named_parts(name, form).items():
        if part.elements == 1:
            made[key] = distributed_like(param, zeros_for(shard, part.dtype))
        else:
            scale = torch.zeros(part.shape(shard.shape), dtype=part.dtype, device=shard.device)
            made[key] = distributed_like(param, scale, part.shape(param.shape))
    return made


def decode_entry(param: Tensor, state: Mapping[str, Any], name: str, form: Format) -> Tensor:
    """A value of a state or the master of a parameter, in the parameter's walking order and on its device.

    It may be a view of the entry. Codes are in blocks of the order in which they were saved, else of that in which
    they lie themselves: that of the parameter unless it has been laid out anew.
    """
    shard = local(param)
    parts = [untagged(form, local(state[key]).to(shard.device)) for key in named_parts(name, form)]
    if has_blocks(form):
        codes, scale = parts
        if FORMAT_KEY in state:
            order = walking_order(state[FORMAT_KEY], codes.ndim)
            codes = codes.permute(order).contiguous().permute([order.index(dim) for dim in range(codes.ndim)])
        elif not is_dense(codes):
            codes = codes.contiguous()
        value = form.decode([flat(codes), scale.contiguous()])
        return walked(shard, value.as_strided(codes.shape, codes.stride()))
    own = [shard.detach()] if name == "param" else []
    return form.decode([walked(shard, part) for part in (*own, *parts)])


def untagged(form: Format, part: Tensor) -> Tensor:
    """A saved part as it is stored: an int16 remainder was saved as bf16."""
    return part.view(torch.int16) if isinstance(form, Split16) and part.dtype == torch.bfloat16 else part


def encoded(value: Tensor, param: Tensor, name: str, form: Format, half: Tensor | None = None) -> State:
    """New entries for a value in walking order, which is rounded to nearest.

    A parameter's own tensor stays as it is. A master is written for `half`, the parameter in walking order, which
    becomes it where that is not nearest; None if the weights that it belongs to may still be loaded.
    """
    shard, made = local(param), make_parts(param, name, form)
    parts = list(map(local, made.values()))
    parts = [walked(shard, part) if part.shape == shard.shape else part for part in parts]
    if isinstance(form, (Split8, Split16, Master)):
        form.encode_rest(value.float(), half, *parts)
    else:
        rounded = _NEAREST.get(form, form).encode(value if isinstance(form, Plain) else value.float())
        for part, stored in zip(parts, rounded, strict=True):
            part.copy_(stored.view(part.shape))
    return made


def has_blocks(form: Format) -> bool:
    """Whether elements share scales."""
    return any(part.elements > 1 for part in form.parts)


def unflat(param: Any, value: Tensor) -> Tensor:
    """A value in walking order as a tensor that is laid out and distributed as the parameter is."""
    return distributed_like(param, unwalked(local(param), value))


def unwalked(shard: Tensor, value: Tensor) -> Tensor:
    """A value in walking order in the shape of the shard."""
    is_flat = has_memory(shard) and is_dense(shard)
    return value.as_strided(shard.shape, shard.stride()) if is_flat else value


@torch.no_grad()
def stored_entries(param: Tensor, state: State, storage: Storage, names: Iterable[str]) -> tuple[State, set[str]]:
    """The entries that a state lacks in its formats, converted from those that it has, and whose place they take.

    Nothing is changed. `names` are those of the states that must be there.
    """
    added: State = {}
    replaced: set[str] = set()
    for name in names:
        form, held = kept_format(storage, state, name), held_format(state, name)
        parts, held_parts = named_parts(name, form), named_parts(name, held) if held else {}
        if parts.keys() == held_parts.keys() and _are_stored(form, param, state, parts):
            continue
        value = decode_entry(param, state, name, held) if held else None
        added |= make_parts(param, name, form) if value is None else encoded(value, param, name, form)
        replaced |= held_parts.keys() - parts.keys()
    parts = named_parts("param", storage.param)
    if parts and (MASTER in state or not _are_stored(storage.param, param, state, parts)):
        half, master = walked(local(param), local(param).detach()), decode_master(param, state)
        added |= encoded(half if master is None else master, param, "param", storage.param, half)
    replaced |= parts_of(state) & {*MASTER_PARTS, MASTER, FORMAT_KEY} - parts.keys()
    return added, replaced


def decode_master(param: Tensor, state: Mapping[str, Any]) -> Tensor | None:
    """The master of a parameter, stored or saved, in walking order; None if it has none. It may be a view."""
    if isinstance(state.get(MASTER), Tensor):
        # PyTorch's loader casts all tensors of a state to the parameter's dtype.
        return decode_entry(param, state, MASTER, Plain(state[MASTER].dtype))
    form = held_master(state, param)
    return decode_entry(param, state, "param", form) if form else None


def held_master(state: Mapping[str, Any], param: Tensor) -> Format | None:
    """How the master of a parameter is stored or saved; None if it has none. A remainder is of bf16 numbers."""
    remainder = state.get("param_remainder")
    if isinstance(remainder, Tensor) and param.dtype == torch.bfloat16:
        return Split8(False) if remainder.dtype == torch.int8 else Split16()
    return Master(param.dtype) if isinstance(state.get("param_master"), Tensor) else None


def _are_stored(form: Format, param: Tensor, state: Mapping[str, Any], parts: Mapping[str, Part]) -> bool:
    """Whether the parts of a format are there, codes in the layout of the parameter."""
    for key, part in parts.items():
        entry = state.get(key)
        if not isinstance(entry, Tensor) or local(entry).dtype != part.dtype:
            return False
    codes = next(iter(parts))
    return not has_blocks(form) or (FORMAT_KEY not in state and same_walk(local(state[codes]), local(param)))
