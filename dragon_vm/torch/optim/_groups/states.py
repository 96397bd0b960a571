"""States of parameters: what a parameter lacks is made, what somebody else put there is settled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # documented there
from torch.utils.weak import WeakIdKeyDictionary

from dragon.vm.torch.optim._devices import has_addresses
from dragon.vm.torch.optim._distributed.shards import distributed_like, is_distributed, local
from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense

State = dict[str, Any]

# For each step counter the buffer that its storage is a piece of; a buffer lives as long as one of its counters.
_buffer_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


def zeros_for(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A zeroed state tensor, laid out as the parameter is; where that is complex, of its dtype."""
    return torch.zeros_like(param, dtype=param.dtype if param.is_complex() else dtype)


class CounterPlace(NamedTuple):
    """Where a step counter lives.

    Attributes:
        device: of the counter.
        for_kernels: whether kernels count there. They read fp32 counters only.
    """

    device: torch.device
    for_kernels: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of new counters: fp32, or PyTorch's fp64 on the CPU where that is the default dtype."""
        is_wide = self._may_be_wide and torch.get_default_dtype() == torch.float64
        return torch.float64 if is_wide else torch.float32

    @property
    def _may_be_wide(self) -> bool:
        return self.device.type == "cpu" and not self.for_kernels

    def takes(self, step: Any) -> bool:
        """Whether a step count is such a counter."""
        return (
            isinstance(step, Tensor)
            and step.device == self.device
            and (step.dtype == torch.float32 or (step.dtype == torch.float64 and self._may_be_wide))
            and not step.requires_grad
            and not step.is_inference()
        )


def count_of(step: Any) -> Tensor:
    """A step count as a 0-dim tensor; a number is exact, whatever the default dtype."""
    if isinstance(step, Tensor):
        return step.detach().reshape(())
    return torch.tensor(float(step), dtype=torch.float64, device="cpu")


def in_own_storage(view: Tensor) -> Tensor:
    """A tensor at the memory of a view, which it keeps alive, with a storage of its own."""
    # A capsule: `from_dlpack` refuses a tensor on another CUDA device than the current one.
    return from_dlpack(to_dlpack(view))


def step_counters(values: Sequence[float], place: CounterPlace) -> list[Tensor]:
    """0-dim step counters, each with a storage of its own.

    Their storages lie side by side in one buffer, so that one operation can count for all of them.
    """
    device, dtype = place.device, place.dtype
    buffer = torch.tensor(values, dtype=dtype, device=device)
    if not (has_memory(buffer) and has_addresses(device)):
        return [torch.tensor(value, dtype=dtype, device=device) for value in values]
    counters = list(map(in_own_storage, buffer.unbind()))
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


def add_counters(states: Iterable[tuple[State, float, CounterPlace]]) -> None:
    """Give states a step counter of a value in a place; those in one place lie side by side."""
    members: dict[CounterPlace, list[tuple[State, float]]] = {}
    for state, value, place in states:
        members.setdefault(place, []).append((state, value))
    for place, chosen in members.items():
        counters = step_counters([value for _, value in chosen], place)
        for (state, _), counter in zip(chosen, counters, strict=True):
            state["step"] = counter


def part_counters(states: Iterable[State]) -> None:
    """Give states that share a step counter one each."""
    seen: set[int] = set()
    for state in states:
        counter = state.get("step")
        if isinstance(counter, Tensor):
            if id(counter) in seen:
                state["step"] = counter.clone()
            seen.add(id(counter))


def settled_entries(param: Tensor, state: State, keys: tuple[str, ...], place: CounterPlace | None) -> State:
    """State entries that must be replaced to be on the parameter's device, in its layout. Nothing is changed."""
    replaced: State = {}
    step = state.get("step")
    if place is not None and not place.takes(step):
        replaced["step"] = count_of(0 if step is None else step).to(place.device, place.dtype, copy=True)
    shard = local(param)
    for key in keys:
        value = local(state[key])
        # Where inference mode made it, no later step outside could write to it.
        settled = (value.clone() if value.is_inference() else value).to(shard.device)
        if value.shape != shard.shape:
            # Scales of blocks: what is the parameter's own is checked.
            settled = settled.contiguous()
        elif has_memory(shard) and is_dense(shard):
            settled = in_layout_of(shard, settled)
        if settled is not value:
            replaced[key] = distributed_like(state[key] if is_distributed(state[key]) else param, settled)
    return replaced
