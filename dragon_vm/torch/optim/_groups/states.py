"""States of parameters: what a parameter lacks is made, what somebody else put there is settled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakIdKeyDictionary

from dragon.vm.torch.optim._distributed.shards import distributed_like, is_distributed, local
from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense

State = dict[str, Any]

# For each step counter the buffer that its storage is a piece of; a buffer lives as long as one of its counters.
_buffer_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


def zeros_for(param: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A zeroed state tensor, laid out as the parameter is, in a storage of its own.

    Args:
        param: a parameter, or this process's shard of one.
        dtype: of the state; None for the parameter's own, which complex parameters always keep.
    """
    dtype = param.dtype if dtype is None or param.is_complex() else dtype
    if not has_memory(param) or not is_dense(param):
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device).zero_()


def counter_dtype(on_device: bool) -> torch.dtype:
    """The dtype of step counters: fp32, which kernels take, but for PyTorch's fp64 under that default dtype."""
    return torch.float64 if not on_device and torch.get_default_dtype() == torch.float64 else torch.float32


def count_of(step: Any) -> Tensor:
    """A step count as a 0-dim tensor; a number is exact, whatever the default dtype."""
    if isinstance(step, Tensor):
        return step.detach().reshape(())
    return torch.tensor(float(step), dtype=torch.float64, device="cpu")


def step_counters(values: Sequence[float], device: torch.device) -> list[Tensor]:
    """0-dim step counters on the CPU or a device, each with a storage of its own.

    Their storages lie side by side in one buffer, so that one operation can count for all of them.
    """
    on_device = device.type != "cpu"
    dtype = counter_dtype(on_device)
    buffer = torch.tensor(values, dtype=dtype, device=device)
    if not has_memory(buffer):
        return [torch.tensor(value, dtype=dtype, device=device) for value in values]
    counters = [from_dlpack(counter) for counter in buffer.unbind()]
    for counter in counters:
        _buffer_of[counter] = buffer
    return counters


def counter_buffer(counters: Sequence[Tensor]) -> Tensor | None:
    """The tensor [len(counters)] of which counters side by side in memory are the elements, if there is one."""
    first = counters[0]
    buffer = _buffer_of.get(first)
    if buffer is None:
        return None
    start = (first.data_ptr() - buffer.data_ptr()) // buffer.element_size()
    # Somebody may have given the counters other memory.
    return buffer[start : start + len(counters)] if 0 <= start <= len(buffer) - len(counters) else None


def begun_average(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """An average of a parameter, which starts at a value of the shape of its shard."""
    return distributed_like(param, zeros_for(local(param), dtype).copy_(value))


def add_counters(states: Iterable[tuple[State, float, torch.device]]) -> None:
    """Give states a step counter of a value on a device; those on one device lie side by side."""
    members: dict[torch.device, list[tuple[State, float]]] = {}
    for state, value, device in states:
        members.setdefault(device, []).append((state, value))
    for device, chosen in members.items():
        counters = step_counters([value for _, value in chosen], device)
        for (state, _), counter in zip(chosen, counters, strict=True):
            state["step"] = counter


def settled_entries(
    param: Tensor, state: Mapping[str, Any], keys: tuple[str, ...], step_device: torch.device | None
) -> State:
    """State entries that must be replaced to be on the parameter's device, in its layout. Nothing is changed."""
    replaced: State = {}
    step = state.get("step")
    if step_device is not None and not _is_counter(step, step_device):
        dtype = counter_dtype(step_device.type != "cpu")
        replaced["step"] = count_of(0 if step is None else step).to(step_device, dtype, copy=True)
    shard = local(param)
    for key in keys:
        value = local(state[key])
        settled = value.to(shard.device)
        if value.shape != shard.shape:
            # Scales of blocks: what is the parameter's own is checked.
            settled = settled.contiguous()
        elif has_memory(shard) and is_dense(shard):
            settled = in_layout_of(shard, settled)
        if settled is not value:
            replaced[key] = distributed_like(state[key] if is_distributed(state[key]) else param, settled)
    return replaced


def _is_counter(step: Any, device: torch.device) -> bool:
    return (
        isinstance(step, Tensor)
        and step.device == device
        and (step.dtype == torch.float32 or (step.dtype == torch.float64 and device.type == "cpu"))
        and step.numel() == 1
        and not step.requires_grad
    )
