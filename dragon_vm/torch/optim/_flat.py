"""`flatten=True`: parameters and gradients in flat buffers, and rows of a table that become one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dragon.vm.torch.optim._flatten import FlattenedGroup
from dragon.vm.torch.optim._layout import is_dense
from dragon.vm.torch.optim._plan import arena_offsets
from dragon.vm.torch.optim._state import SLOT, common_base

read_grad = attrgetter("grad")


class FlatBuffer:
    """One buffer of parameters of one device and dtype, and a twin for their gradients.

    Args:
        params: dense tensors; their values move into the buffer, and their `.data` becomes a view of it.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        offsets = arena_offsets([param.numel() for param in params], SLOT)
        self.values = torch.zeros(offsets[-1], dtype=params[0].dtype, device=params[0].device)
        self.grads = torch.zeros_like(self.values)
        self.grad_views = [
            self.grads.as_strided(param.shape, param.stride(), offset)
            for param, offset in zip(params, offsets, strict=False)
        ]
        for param, offset in zip(params, offsets, strict=False):
            view = self.values.as_strided(param.shape, param.stride(), offset)
            view.copy_(param.detach())
            # A storage of its own, so that saving or copying one parameter does not drag the buffer along.
            if view.numel():
                param.data = from_dlpack(view)

    def gather(self) -> None:
        """Move gradients that somebody else put there into the buffer; None stays None."""
        grads = list(map(read_grad, self.params))
        if all(map(is_, grads, self.grad_views)):
            return
        # A gradient may be the view of another parameter: none is overwritten before it is read.
        own = self.grads.untyped_storage().data_ptr()
        grads = [
            grad.clone()
            if grad is not None
            and grad is not view
            and grad.layout == torch.strided
            and grad.grad_fn is None
            and grad.untyped_storage().data_ptr() == own
            else grad
            for grad, view in zip(grads, self.grad_views, strict=True)
        ]
        for param, grad, view in zip(self.params, grads, self.grad_views, strict=True):
            fits = grad is not None and grad is not view and grad.layout == torch.strided and grad.grad_fn is None
            fits = fits and (grad.dtype, grad.device) == (view.dtype, view.device)
            if fits and grad.shape == view.shape == param.shape:
                param.grad = view.copy_(grad)

    def zero(self) -> bool:
        """Set all gradients to zero by one memset; False if some are not in the buffer."""
        grads = map(read_grad, self.params)
        if not all(map(is_, grads, self.grad_views)):
            return False
        self.grads.zero_()
        return True


def make_buffers(params: Sequence[Tensor]) -> list[FlatBuffer]:
    """Move parameters into flat buffers, one for each device and dtype; those that are not dense stay."""
    members: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if is_dense(param) and type(param.data) is Tensor:
            members.setdefault((param.device, param.dtype), []).append(param)
    return [FlatBuffer(chosen) for chosen in members.values()]


def _pitch(param: Tensor) -> int:
    """Elements from a tensor in an arena to its successor."""
    return -(-param.numel() // SLOT) * SLOT


class _Walk:
    """The memory that one entry of a flattened group walks: addresses and element sizes of its tensors."""

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], keys: Sequence[str]) -> None:
        tensors = (param, grad, *(state[key] for key in keys))
        self.is_padded = _pitch(param) != param.numel()
        self.addresses = [tensor.data_ptr() for tensor in tensors]
        # Neighbours in memory may still be of different allocations.
        self.storages = [tensor.untyped_storage().data_ptr() for tensor in tensors[1:]]
        self.next_addresses = [tensor.data_ptr() + _pitch(param) * tensor.element_size() for tensor in tensors]
        step = state.get("step")
        self.step = None if step is None else float(step)


def coalesce(
    group: FlattenedGroup, grads: Sequence[Tensor], buffers: Sequence[FlatBuffer], apart: Collection[int]
) -> FlattenedGroup | None:
    """Join entries whose tensors follow each other in memory, and whose step counts agree, into one entry each.

    Reads the step counters, which on an accelerator synchronises, once for a set of parameters.

    Args:
        group: whose entries are joined.
        grads: their gradients.
        buffers: where parameters were moved to.
        apart: parameter groups whose entries must stay apart, to be clipped or counted each on its own.

    Returns:
        The joined group; None if nothing joins.
    """
    if group.signature.backend == "eager":
        return None
    keys = [*group.signature.state_keys, *(["ema"] if group.signature.average else [])]
    walks = [
        _Walk(param, grad, state, keys)
        for param, grad, state in zip(group.params, grads, group.states, strict=True)
    ]
    # Between gradients that lie elsewhere there may be something else.
    own = {buffer.grads.untyped_storage().data_ptr() for buffer in buffers}
    starts = [0]
    for index, (left, right) in enumerate(pairwise(walks), start=1):
        if (
            left.next_addresses != right.addresses
            or left.storages != right.storages
            or group.rows[index] in apart
            or (left.is_padded and left.storages[0] not in own)
            or left.step != right.step
            or group.rows[index - 1] != group.rows[index]
        ):
            starts.append(index)
    runs = [slice(start, end) for start, end in pairwise([*starts, len(walks)])]
    if len(runs) == len(walks):
        return None
    # Entries of one tensor stay as they are, so that only what is joined must lie in a buffer.
    joined = [_join(group, grads, keys, run, buffers) for run in runs]
    if any(entry is None for entry in joined):
        return None
    params, run_grads, states = (list(column) for column in zip(*filter(None, joined), strict=True))
    rows = [group.rows[run.start] for run in runs]
    indices = [group.indices[run.start] for run in runs]
    return FlattenedGroup(group.signature, params, states, rows, indices, run_grads)


def _join(
    group: FlattenedGroup, grads: Sequence[Tensor], keys: Sequence[str], run: slice, buffers: Sequence[FlatBuffer]
) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    params, states = group.params[run], group.states[run]
    if len(params) == 1:
        # The memory that premises compare, whatever becomes of the object.
        return params[0], grads[run.start].detach(), states[0]
    length = sum(map(_pitch, params))
    values = _span(params[0], length, buffers)
    if values is None:
        return None
    state: dict[str, Any] = {key: _flat_view(states[0][key], length) for key in keys}
    if group.signature.state_keys:
        counters = common_base([entry["step"] for entry in states])
        if counters is None:
            return None
        state["step"], state["followers"] = counters[0], counters[1:]
    return values, _flat_view(grads[run.start], length), state


def _span(param: Tensor, length: int, buffers: Sequence[FlatBuffer]) -> Tensor | None:
    """`length` elements from a parameter's first one on, of the buffer that it lives in."""
    for buffer in buffers:
        first = (param.data_ptr() - buffer.values.data_ptr()) // param.element_size()
        if param.dtype == buffer.values.dtype and 0 <= first <= len(buffer.values) - length:
            return buffer.values[first : first + length]
    return None


def _flat_view(first: Tensor, length: int) -> Tensor:
    return first.as_strided((length,), (1,))
