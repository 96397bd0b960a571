"""States of parameters: what a parameter lacks is made, what somebody else put there is settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    return buffer[start : start + len(counters)] if start + len(counters) <= len(buffer) else None


def missing_states(
    params: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    keys: Sequence[tuple[str, ...]],
    step_devices: Sequence[torch.device | None],
    average_dtypes: Sequence[torch.dtype | None],
    uncounted_steps: float | None = None,
) -> list[State]:
    """For each parameter the average and the counter that its state lacks. Nothing is changed.

    Args:
        params: parameters.
        states: their states.
        keys: names of each one's state tensors, beside "step".
        step_devices: where each one's step counter lives; None for an update that does not count.
        average_dtypes: of each one's average; None for none.
        uncounted_steps: the count of a state that has other tensors but no counter; None for 0.
    """
    added: list[State] = [{} for _ in params]
    counters: dict[torch.device, list[int]] = {}
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        dtype = average_dtypes[index]
        if dtype is not None and "ema" not in state:
            # An average starts where its parameter is.
            average = zeros_for(local(param), dtype)
            added[index]["ema"] = distributed_like(param, average.copy_(local(param).detach()))
        device = step_devices[index]
        if device is not None and "step" not in state:
            counters.setdefault(device, []).append(index)
    for device, indices in counters.items():
        # An average may have begun before the first step that counts.
        begun = [any(key in states[i] for key in keys[i] if key != "ema") for i in indices]
        values = [uncounted_steps or 0.0 if has_begun else 0.0 for has_begun in begun]
        for i, counter in zip(indices, step_counters(values, device), strict=True):
            added[i]["step"] = counter
    return added


def settled_entries(
    param: Tensor, state: Mapping[str, Any], keys: tuple[str, ...], step_device: torch.device | None
) -> State:
    """State entries that must be replaced to be on the parameter's device, in its layout. Nothing is changed."""
    replaced: State = {}
    step = state.get("step")
    if step_device is not None and not _is_counter(step, step_device):
        value = step.detach() if isinstance(step, Tensor) else torch.tensor(float(step or 0), device="cpu")
        dtype = counter_dtype(step_device.type != "cpu")
        replaced["step"] = value.to(step_device, dtype, copy=True).reshape(())
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
