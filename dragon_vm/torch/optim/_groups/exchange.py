"""States on their way out and in: PyTorch's form with fp32 tensors, and the native form with the stored parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._formats import Format, Master, Plain, Split8, Split16
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense
from dragon.vm.torch.optim._groups.storage import (
    State,
    decode_entry,
    encode_entry,
    held_format,
    make_parts,
    options_of,
    part_keys,
    storage_of,
    unflat,
)

# The entry of a native state that says how its parts are to be read. PyTorch's flat dicts take numbers alone.
FORMAT_KEY, FORMAT = "storage", 1
# The entry of PyTorch's form that has a master in fp32.
MASTER = "master_param"
# Those of the native form.
MASTER_PARTS = ("param_remainder", "param_master")


def is_part(key: str) -> bool:
    """Whether an entry is a part of something, or what stands for it in a state dict."""
    return key in (*MASTER_PARTS, MASTER, FORMAT_KEY) or key.endswith(("_q8", "_scale"))


def held_master(state: Mapping[str, Any], param: Tensor) -> Format | None:
    """How the master of a parameter is stored or saved; None if it has none."""
    remainder = state.get("param_remainder")
    if isinstance(remainder, Tensor):
        return Split8(False) if remainder.dtype == torch.int8 else Split16()
    return Master(param.dtype) if isinstance(state.get("param_master"), Tensor) else None


@torch.no_grad()
def pytorch_state(param: Tensor, state: State, position: int) -> State:
    """A state in PyTorch's form: 8-bit moments in fp32, the master as `master_param`, and the rest as it is.

    Without the number of its random words where that is the parameter's position, as it will be when the state is
    loaded: DCP's planner would not find it in a file of PyTorch's optimizer.
    """
    found: State = {}
    for key, value in state.items():
        if key == "stream" and value == position:
            continue
        if key.endswith("_q8"):
            name = key.removesuffix("_q8")
            form = held_format(state, name)
            assert form is not None
            found[name] = unflat(param, decode_entry(param, state, name, form))
        elif key in MASTER_PARTS:
            form = held_master(state, param)
            assert form is not None
            found[MASTER] = (
                value if key == "param_master" else unflat(param, decode_entry(param, state, "param", form))
            )
        elif not key.endswith("_scale"):
            found[key] = value
    return found


def tagged_state(param: Tensor, state: State, position: int) -> State:
    """A state in the native form, with the version of the format if it has parts.

    An int16 remainder becomes bf16 of the same bits: process groups of gloo and NCCL have no int16.
    """
    if not any(map(is_part, state)):
        return state
    found, remainder = {**state, FORMAT_KEY: FORMAT}, state.get("param_remainder")
    if isinstance(remainder, Tensor) and remainder.dtype == torch.int16:
        found["param_remainder"] = distributed_like(param, local(remainder).view(torch.bfloat16))
    return found


def restored_entries(
    param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], names: Sequence[str]
) -> tuple[State, bool]:
    """Copies of a saved state's moments and master in the formats of a parameter, in either form.

    Args:
        param: the parameter; only its layout and placement matter, unless saved masters change their format.
        group: its group.
        saved: the state.
        names: of the moments.

    Returns:
        The entries, and whether some value is stored in parts.
    """
    storage, options = storage_of(param, group, names), options_of(group)
    entries: State = {}
    for name in names:
        held = held_format(saved, name)
        if held is None:
            continue
        form = storage.states[name]
        if isinstance(form, Plain) and not isinstance(options.asked(name), torch.dtype) and not param.is_complex():
            dtype = saved[name].dtype if isinstance(held, Plain) else torch.float32
            form = Plain(torch.promote_types(dtype, form.dtype))
        made = make_parts(param, name, form)
        if isinstance(held, Plain) and isinstance(form, Plain):
            made[name].copy_(placed_like(made[name], saved[name]))
        else:
            placed = _placed(param, saved, part_keys(name, held))
            encode_entry(decode_entry(param, placed, name, held).float(), param, made, name, form)
        entries |= made
    entries |= _restored_master(param, storage.param, saved)
    return entries, not all(isinstance(form, Plain) for form in (storage.param, *storage.states.values()))


def _restored_master(param: Tensor, form: Format, saved: Mapping[str, Any]) -> State:
    """The parts of a master beside the parameter; none if none is wanted or saved."""
    keys, held = part_keys("param", form), held_master(saved, param)
    if not keys or not (held or isinstance(saved.get(MASTER), Tensor)):
        return {}
    made = make_parts(param, "param", form)
    if isinstance(saved.get(MASTER), Tensor):
        placed = _placed(param, saved, (MASTER,))
        # PyTorch's loader casts all tensors of a state to the parameter's dtype.
        value = decode_entry(param, placed, MASTER, Plain(torch.float32)).float()
        encode_entry(value, param, made, "param", form)
        return made
    assert held is not None
    placed = _placed(param, saved, part_keys("param", held))
    if isinstance(held, Split16):
        placed["param_remainder"] = placed["param_remainder"].view(torch.int16)
    if all(key in placed and placed[key].dtype == local(made[key]).dtype for key in keys):
        for key in keys:
            local(made[key]).copy_(placed[key])
    else:
        encode_entry(decode_entry(param, placed, "param", held), param, made, "param", form)
    return made


def _placed(param: Tensor, saved: Mapping[str, Any], keys: Sequence[str]) -> State:
    """The shards of saved entries that this process needs, laid out as the parameter is."""
    shard, found = local(param), {}
    for key in keys:
        value = local(placed_like(param, saved[key])).to(shard.device)
        found[key] = in_layout_of(shard, value) if value.shape == shard.shape and is_dense(shard) else value
    return found
