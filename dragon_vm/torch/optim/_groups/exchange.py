"""States on their way out and in: PyTorch's form with fp32 tensors, and the native form with the stored parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.resolve import Storage
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._groups.entries import (
    decode_entry,
    encoded,
    held_format,
    held_master,
    kept_format,
    make_parts,
    named_parts,
    unflat,
    untagged,
)
from dragon.vm.torch.optim._groups.native import CODES, FORMAT_KEY, MASTER, MASTER_PARTS, format_number, parts_of
from dragon.vm.torch.optim._groups.states import State


@torch.no_grad()
def pytorch_state(param: Tensor, state: State, position: int) -> State:
    """A state in PyTorch's form: 8-bit moments in fp32, the master as `master_param`, and the rest as it is.

    Without the number of its random words where that is the parameter's position, as it will be when the state is
    loaded: DCP's planner would not find it in a file of PyTorch's optimizer.
    """
    found: State = {}
    parts = parts_of(state)
    for key, value in state.items():
        if key == "stream" and value == position:
            continue
        if key in CODES:
            name = CODES[key]
            form = held_format(state, name)
            assert form is not None
            found[name] = unflat(param, decode_entry(param, state, name, form))
        elif key in MASTER_PARTS and MASTER not in state:
            form = held_master(state, param)
            if key == "param_master":
                found[MASTER] = value
            elif form is not None:
                found[MASTER] = unflat(param, decode_entry(param, state, "param", form))
        elif key == MASTER or key not in parts:
            found[key] = value
    return found


def tagged_state(param: Tensor, state: State, position: int) -> State:
    """A state in the native form, with the version of the format if it has parts.

    An int16 remainder becomes bf16 of the same bits: process groups of gloo and NCCL have no int16.
    """
    if not parts_of(state):
        return state
    found, remainder = {FORMAT_KEY: format_number(state), **state}, state.get("param_remainder")
    if isinstance(remainder, Tensor) and remainder.dtype == torch.int16:
        found["param_remainder"] = distributed_like(param, local(remainder).view(torch.bfloat16))
    return found


def restored_entries(param: Tensor, storage: Storage, saved: Mapping[str, Any]) -> State:
    """Copies of a saved state's moments and master, in either form, in the formats of a parameter.

    A saved remainder stays what it is until the first step: the weights that it belongs to may be loaded later.
    """
    entries: State = {}
    for name in storage.states:
        held = held_format(saved, name)
        if held is None:
            continue
        form = kept_format(storage, saved, name)
        if isinstance(held, Plain) and isinstance(form, Plain):
            entries |= make_parts(param, name, form)
            entries[name].copy_(placed_like(entries[name], saved[name]))
        else:
            placed = _placed(param, saved, named_parts(name, held))
            entries |= encoded(decode_entry(param, placed, name, held), param, name, form)
    return entries | _restored_master(param, storage.param, saved)


def _restored_master(param: Tensor, form: Format, saved: Mapping[str, Any]) -> State:
    """The parts of a master beside the parameter; none if none is wanted or saved."""
    if not named_parts("param", form):
        return {}
    if isinstance(saved.get(MASTER), Tensor):
        value = decode_entry(param, _placed(param, saved, (MASTER,)), MASTER, Plain(saved[MASTER].dtype))
        return encoded(value, param, "param", form)
    held = held_master(saved, param)
    if held is None:
        return {}
    made = make_parts(param, "param", held)
    placed = _placed(param, saved, made)
    for key, entry in made.items():
        local(entry).copy_(untagged(held, placed[key]))
    return made


def _placed(param: Tensor, saved: Mapping[str, Any], keys: Iterable[str]) -> State:
    """The shards of saved entries that this process needs, and the number that says how they are to be read.

    PyTorch's flat dicts have lost the number: there codes are walked as they lie.
    """
    number = {FORMAT_KEY} & parts_of(saved)
    return {key: local(placed_like(param, saved[key])) for key in keys} | {key: saved[key] for key in number}
