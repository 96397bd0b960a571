"""`flatten=True`: parameters, gradients and states in flat buffers, each of which is updated as one entry."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, compress
from operator import attrgetter, is_, ne
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._groups.states import State, in_own_storage

# Every tensor of a buffer starts at a multiple of this many elements: 16 bytes of any dtype.
SLOT = 16

_shape_of = attrgetter("shape")


class FlatBuffer:
    """Parameters of one group, device and dtype, and their gradients and states, each in one flat tensor.

    It holds no parameter: a parameter belongs to it as long as it lies at its place in the buffer.

    Args:
        params: dense tensors; their values move into the buffer, and their `.data` becomes a view of it.

    Attributes:
        values, grads: the flat tensors; gaps between parameters are 0.
        addresses, grad_addresses: of each parameter's place in them.
        grad_views: each parameter's gradient in its layout.
        state: the flat states by name, and the step counter that all parameters share.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        *starts, end = accumulate((-(-param.numel() // SLOT) * SLOT for param in params), initial=0)
        self._places = [(param.shape, param.stride(), start) for param, start in zip(params, starts, strict=True)]
        self.values = torch.zeros(end, dtype=params[0].dtype, device=params[0].device)
        self.grads = torch.zeros_like(self.values)
        self.grad_views = self.views(self.grads)
        self.addresses = [view.data_ptr() for view in self.views(self.values)]
        self.grad_addresses = [view.data_ptr() for view in self.grad_views]
        self._laid_out = _laid_out(self.grad_views)
        self.state: State = {}
        for param, view in zip(params, self.views(self.values), strict=True):
            view.copy_(param.detach())
            # A storage of its own, so that saving or copying one parameter does not drag the buffer along.
            param.data = in_own_storage(view)

    def positions(self, shards: Sequence[Tensor]) -> list[int] | None:
        """Where this buffer's parameters stand among tensors; None unless all are there, in their layouts."""
        index_of = {shard.data_ptr(): index for index, shard in enumerate(shards)}
        found = [index_of.get(address, -1) for address in self.addresses]
        for index, (shape, stride, _) in zip(found, self._places, strict=True):
            if index < 0 or (shards[index].shape, shards[index].stride()) != (shape, stride):
                return None
        return found

    def takes_no_part(self, chosen: Sequence[Tensor], every: Sequence[Tensor]) -> bool:
        """Whether none of its parameters is among the chosen tensors, and all are still among all tensors."""
        return set(self.addresses).isdisjoint(map(Tensor.data_ptr, chosen)) and self.positions(every) is not None

    def flat_state(self, key: str, dtype: torch.dtype) -> Tensor:
        """The flat tensor of a state: that which there is, or a new one."""
        held = self.state.get(key)
        return held if held is not None and held.dtype == dtype else torch.zeros_like(self.values, dtype=dtype)

    def flat_tensors(self) -> list[tuple[str, Tensor]]:
        """All flat tensors, with the names that their pieces have in states."""
        states = [(key, flat) for key, flat in self.state.items() if key != "step"]
        return [("param", self.values), ("grad", self.grads), *states]

    def moves(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], strays: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters whose gradients lie elsewhere, or otherwise as `strays`; those gradients, their places."""
        addresses = list(map(Tensor.data_ptr, grads))
        if addresses == self.grad_addresses and not strays and all(map(is_, grads, self.grad_views)):
            return [], [], []
        # Parameters have these very tensors as gradients: somebody may have assigned to their `.data`.
        if _laid_out(self.grad_views) != self._laid_out:
            self.grad_views = self.views(self.grads)
        are_moved = bytearray(map(ne, addresses, self.grad_addresses))
        for index in strays:
            are_moved[index] = True
        moved, sources, views = (list(compress(each, are_moved)) for each in (params, grads, self.grad_views))
        return moved, sources, views

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's place in a flat tensor."""
        return [flat.as_strided(*place) for place in self._places]

    def joined_copy(self, grads: Sequence[Tensor]) -> Tensor:
        """A flat tensor with these values at the places of the gradients, which stay as they are."""
        flat = torch.zeros_like(self.grads)
        torch._foreach_copy_(self.views(flat), list(grads))
        return flat


def _laid_out(tensors: Sequence[Tensor]) -> list[object]:
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors), *map(_shape_of, tensors)]


def gather(
    members: Iterable[tuple[FlatBuffer, Sequence[Tensor], Sequence[Tensor], Sequence[int]]],
    others: Iterable[Tensor],
) -> bool:
    """Move gradients that lie elsewhere into the buffers, and give the parameters views of them.

    Args:
        members: each buffer with its parameters, their gradients, of the buffer's dtype and device, and the
            indices of those that are laid out otherwise than their parameters.
        others: parameters outside of them. A gradient that is in the way of another gets memory of its own.

    Returns:
        Whether some gradient has moved.
    """
    moves = [(buffer.grads, *buffer.moves(params, grads, strays)) for buffer, params, grads, strays in members]
    moves = [move for move in moves if move[1]]
    if not moves:
        return False
    written = _Memory(flat for flat, *_ in moves)
    read = [written.apart(sources) for _, _, sources, _ in moves]
    for param in others:
        if param.grad is not None:
            (param.grad,) = written.apart([param.grad])
    for (_, moved, _, views), sources in zip(moves, read, strict=True):
        torch._foreach_copy_(views, sources)
        for param, view in zip(moved, views, strict=True):
            param.grad = view
    return True


def take_states(
    members: Sequence[tuple[FlatBuffer, Sequence[State], Sequence[str], bool]], others: Iterable[State]
) -> list[list[State]]:
    """Make the states of buffers' parameters views of flat tensors, of the values that they have.

    Args:
        members: each buffer with complete states of its parameters, which fit and are not changed, names of their
            tensors beside "step", and whether they count steps.
        others: states of parameters outside of them. What is in the way of another gets memory of its own.

    Returns:
        For each buffer and each of its parameters the entries to replace.
    """
    flats = [
        {key: buffer.flat_state(key, states[0][key].dtype) for key in keys} for buffer, states, keys, _ in members
    ]
    moves: list[tuple[State, str, Tensor, Tensor]] = []
    replaced: list[list[State]] = []
    for (buffer, states, keys, counts_steps), flat in zip(members, flats, strict=True):
        # The first one's counter is that of all.
        counter: State = {"step": states[0]["step"]} if counts_steps else {}
        buffer.state = {**flat, **counter}
        entries = [dict(counter) for _ in states]
        for key in keys:
            places = zip(entries, buffer.views(flat[key]), states, strict=True)
            moves += [(own, key, view, state[key]) for own, view, state in places]
        replaced.append(entries)
    moves = [move for move in moves if move[2].data_ptr() != move[3].data_ptr()]
    written = _Memory(each for flat in flats for each in flat.values())
    sources = written.apart([source for *_, source in moves])
    for state in others if moves else ():
        for key, value in state.items():
            if isinstance(value, Tensor) and has_memory(value):
                (state[key],) = written.apart([value])
    for (own, key, view, _), source in zip(moves, sources, strict=True):
        view.copy_(source)
        own[key] = in_own_storage(view)
    return replaced


class _Memory:
    """The memory of some flat tensors."""

    def __init__(self, flats: Iterable[Tensor]) -> None:
        spans = sorted((flat.data_ptr(), flat.data_ptr() + flat.nbytes) for flat in flats)
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]

    def apart(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, with copies of those that lie here, and might be overwritten before they are read."""
        addresses = list(map(Tensor.data_ptr, tensors))
        # The speed of C, where none is close.
        if not (self._starts and any(map(range(self._starts[0], self._ends[-1]).__contains__, addresses))):
            return tensors
        return [
            tensor.clone() if self._holds(address) else tensor
            for tensor, address in zip(tensors, addresses, strict=True)
        ]

    def _holds(self, address: int) -> bool:
        index = bisect_right(self._starts, address) - 1
        return index >= 0 and address < self._ends[index]


def make_buffers(groups: Iterable[Mapping[str, Any]]) -> list[FlatBuffer]:
    """Move the trained parameters of each group into flat buffers, one for each device and dtype.

    Those that are not dense, or that have no memory of their own, stay where they are. A group with `clip_norm`
    has no buffers: each of its gradients is clipped on its own.

    Raises:
        ValueError: for a parameter in shared memory, which a move would take out of it. Nothing has moved then.
    """
    members: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
    for index, group in enumerate(groups):
        for param in () if group.get("clip_norm") else group["params"]:
            if not (param.requires_grad and param.numel() and has_memory(param) and is_dense(param)):
                continue
            if param.device.type == "cpu" and param.is_shared():
                raise ValueError(
                    "flatten=True moves parameters into buffers of this process, but one of shape "
                    f"{tuple(param.shape)} is in shared memory: leave flatten=False, or share the memory "
                    "afterwards"
                )
            members.setdefault((index, param.device, param.dtype), []).append(param)
    # One tensor alone gains nothing.
    return [FlatBuffer(chosen) for chosen in members.values() if len(chosen) > 1]
