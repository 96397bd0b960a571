"""`flatten=True`: parameters, gradients and states in flat buffers, each of which is updated as one entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from operator import ne
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._groups.states import State

# Every tensor of a buffer starts at a multiple of this many elements: 16 bytes of any dtype.
SLOT = 16


class FlatBuffer:
    """Parameters of one group, device and dtype, and their gradients and states, each in one flat tensor.

    It holds no parameter: a parameter belongs to it as long as it lies at its place in the buffer.

    Args:
        params: dense tensors; their values move into the buffer, and their `.data` becomes a view of it.

    Attributes:
        values, grads: the flat tensors; gaps between parameters are 0.
        addresses, grad_addresses: of each parameter's place in them.
        grad_views: each parameter's gradient in its layout.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        starts = [0]
        for param in params:
            starts.append(starts[-1] + -(-param.numel() // SLOT) * SLOT)
        self._places = [(param.shape, param.stride(), start) for param, start in zip(params, starts, strict=False)]
        self.values = torch.zeros(starts[-1], dtype=params[0].dtype, device=params[0].device)
        self.grads = torch.zeros_like(self.values)
        self.grad_views = self._views(self.grads)
        self.addresses = [view.data_ptr() for view in self._views(self.values)]
        self.grad_addresses = [view.data_ptr() for view in self.grad_views]
        self._state: State = {}
        for param, view in zip(params, self._views(self.values), strict=True):
            view.copy_(param.detach())
            # A storage of its own, so that saving or copying one parameter does not drag the buffer along.
            param.data = from_dlpack(view)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(*place) for place in self._places]

    def positions(self, addresses: Sequence[int]) -> list[int] | None:
        """Where this buffer's parameters stand among tensors of these addresses; None unless all are there."""
        index_of = {address: index for index, address in enumerate(addresses)}
        found = [index_of.get(address) for address in self.addresses]
        return None if None in found else [index for index in found if index is not None]

    def take_states(self, states: Sequence[State], keys: Sequence[str], counts_steps: bool) -> list[State] | None:
        """Make the parameters' states views of flat tensors, of the values that they have.

        Reads the step counters, which on an accelerator synchronises.

        Args:
            states: complete states of the parameters; not changed.
            keys: names of their tensors, beside "step".
            counts_steps: whether they count steps.

        Returns:
            For each parameter the entries to replace; None if the states cannot be joined, since step counts or
            dtypes differ.
        """
        if counts_steps and len({float(state["step"]) for state in states}) > 1:
            return None
        if any(len({state[key].dtype for state in states}) > 1 for key in keys):
            return None
        replaced: list[State] = [{} for _ in states]
        for key in keys:
            dtype = states[0][key].dtype
            flat = self._state.get(key)
            if flat is None or flat.dtype != dtype:
                flat = torch.zeros(len(self.values), dtype=dtype, device=self.values.device)
            moved = [
                (entries, view, state[key])
                for state, entries, view in zip(states, replaced, self._views(flat), strict=True)
                if state[key].data_ptr() != view.data_ptr()
            ]
            sources = _apart_from(flat, [source for _, _, source in moved])
            for (entries, view, _), source in zip(moved, sources, strict=True):
                view.copy_(source)
                entries[key] = from_dlpack(view)
            self._state[key] = flat
        if counts_steps:
            self._state["step"] = states[0]["step"]
            for state, entries in zip(states, replaced, strict=True):
                if state["step"] is not self._state["step"]:
                    entries["step"] = self._state["step"]
        return replaced

    @property
    def state(self) -> State:
        """The flat states by name, and the step counter that all parameters share."""
        return self._state

    def gather(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Move gradients that lie elsewhere into the buffer, and give the parameters views of it.

        Args:
            params: the buffer's parameters.
            grads: their gradients, of the buffer's dtype and device.
        """
        addresses = list(map(Tensor.data_ptr, grads))
        if addresses == self.grad_addresses:
            return
        are_moved = bytes(map(ne, addresses, self.grad_addresses))
        moved, sources, views = (list(compress(each, are_moved)) for each in (params, grads, self.grad_views))
        sources = _apart_from(self.grads, sources)
        torch._foreach_copy_(views, sources)
        for param, view in zip(moved, views, strict=True):
            param.grad = view

    def joined_copy(self, grads: Sequence[Tensor]) -> Tensor:
        """A flat tensor with these values at the places of the gradients, which stay as they are."""
        flat = torch.zeros_like(self.grads)
        torch._foreach_copy_(self._views(flat), list(grads))
        return flat


def _apart_from(flat: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """The tensors; copies if one lies in the buffer, where it might be overwritten before it is read."""
    first = flat.data_ptr()
    within = range(first, first + flat.nbytes)
    if any(source.data_ptr() in within for source in sources):
        return [source.clone() for source in sources]
    return sources


def make_buffers(groups: Iterable[Mapping[str, Any]]) -> list[FlatBuffer]:
    """Move the trained parameters of each group into flat buffers, one for each device and dtype.

    Those that are not dense, or that have no memory of their own, stay where they are. A group with `clip_norm`
    has no buffers: each of its gradients is clipped on its own.

    Raises:
        ValueError: for a parameter in shared memory, which a move would take out of it.
    """
    return [buffer for group in groups if not group.get("clip_norm") for buffer in _buffers_of(group["params"])]


def _buffers_of(params: Sequence[Tensor]) -> list[FlatBuffer]:
    members: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if not (param.requires_grad and param.numel() and has_memory(param) and is_dense(param)):
            continue
        if param.device.type == "cpu" and param.is_shared():
            raise ValueError(
                "flatten=True moves parameters into buffers of this process, but one of shape "
                f"{tuple(param.shape)} is in shared memory: leave flatten=False, or share the memory afterwards"
            )
        members.setdefault((param.device, param.dtype), []).append(param)
    # One tensor alone gains nothing.
    return [FlatBuffer(chosen) for chosen in members.values() if len(chosen) > 1]
