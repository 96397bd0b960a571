"""`flatten=True`: small parameters and their states in flat buffers, each of which is updated as one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._groups.checks import has_memory, is_freed
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._groups.states import State, in_own_storage

# Every tensor of a buffer starts at a multiple of this many elements: 16 bytes of any dtype.
SLOT = 16

# Tensors of fewer elements are small. PyTorch's fused operations on the CPU begin anew for each tensor:
# - They fork their threads for it: 1000 tensors of 1000 elements took 2.05 ms on two threads, 0.87 ms on one.
# - In one piece the 1000 took 0.42 ms in place of 1.51, and copies of their gradients 0.61 ms; 100 of 100,000 took
#   8.6 ms in place of 9.1, and 2.3 ms (torch 2.13, one thread of another machine).
SMALL_NUMEL = 8192


class FlatBuffer:
    """Small parameters of one group and dtype, their states, and copies of their gradients: flat tensors.

    It holds no parameter: a parameter belongs to it as long as it lies at its place in the buffer.

    Args:
        params: dense tensors; their values move into the buffer, and their `.data` becomes a view of it.

    Attributes:
        values, grads: the flat tensors. What is in the gaps between parameters means nothing.
        addresses: of each parameter's place.
        state: the flat states by name.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        *starts, end = accumulate((-(-param.numel() // SLOT) * SLOT for param in params), initial=0)
        self._places = [(param.shape, param.stride(), start) for param, start in zip(params, starts, strict=True)]
        self.values = torch.zeros(end, dtype=params[0].dtype, device=params[0].device)
        self.grads = torch.zeros_like(self.values)
        self._grad_views = self.views(self.grads)
        self.addresses = [view.data_ptr() for view in self.views(self.values)]
        self.state: State = {}
        for param, view in zip(params, self.views(self.values), strict=True):
            view.copy_(param.detach())
            # A storage of its own, so that saving or copying one parameter does not drag the buffer along.
            param.data = in_own_storage(view)

    def positions(self, shards: Sequence[Tensor]) -> list[int] | None:
        """Where this buffer's parameters stand among tensors; None unless all are there as they were."""
        index_of = {shard.data_ptr(): index for index, shard in enumerate(shards)}
        found = [index_of.get(address, -1) for address in self.addresses]
        for index, (shape, stride, _) in zip(found, self._places, strict=True):
            if index < 0 or (shards[index].shape, shards[index].stride()) != (shape, stride):
                return None
            if shards[index].dtype != self.values.dtype:
                return None
        return found

    def take_states(self, states: Sequence[State], keys: Iterable[str]) -> list[State]:
        """Make states views of flat tensors, of the values that they have.

        Where one is to move, all move to new memory: somebody may keep the old states, to go back to them.

        Args:
            states: of all parameters, in order, complete. They fit and are not changed.
            keys: the names of their tensors, which have the dtype of the parameters.

        Returns:
            For each parameter the entries to replace.
        """
        flats: State = {}
        replaced: list[State] = [{} for _ in states]
        for key in keys:
            values, held = [state[key] for state in states], self.state.get(key)
            if held is None or [*map(Tensor.data_ptr, values)] != [*map(Tensor.data_ptr, self.views(held))]:
                held = torch.zeros_like(self.values)
                for entries, view, value in zip(replaced, self.views(held), values, strict=True):
                    entries[key] = in_own_storage(view.copy_(value))
            flats[key] = held
        self.state = flats
        return replaced

    def flat_tensors(self) -> list[tuple[str, Tensor]]:
        """All flat tensors, with the names that their pieces have in states."""
        return [("param", self.values), ("grad", self.grads), *self.state.items()]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's place in a flat tensor."""
        return [flat.as_strided(*place) for place in self._places]

    def copy_grads(self, grads: Sequence[Tensor]) -> None:
        """Copy the gradients of all parameters, in order, to their places."""
        torch._foreach_copy_(self._grad_views, list(grads))


class Joined(NamedTuple):
    """A flat buffer of a step.

    Attributes:
        buffer: its parameters step together.
        positions: where they stand among others, in its order.
        flats: the buffer's flat tensors of this step, by the names that their pieces have in states.
    """

    buffer: FlatBuffer
    positions: list[int]
    flats: Mapping[str, Tensor]


def make_buffers(groups: Iterable[Mapping[str, Any]], *, leaves_shared: bool = False) -> list[FlatBuffer]:
    """Move the small trained parameters on the CPU of each group into flat buffers, one for each dtype.

    Those that are not dense, or that have no memory of their own, or none now, stay where they are. A group with
    `clip_norm` has no buffers: each of its gradients is clipped on its own. With `leaves_shared` those in shared
    memory stay there.

    Raises:
        ValueError: else for one in shared memory, which a move would take out of it. Nothing has moved then.
    """
    members: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for index, group in enumerate(groups):
        for param in () if group.get("clip_norm") else group["params"]:
            if not (param.requires_grad and has_memory(param) and is_dense(param)) or is_freed(param):
                continue
            if param.device.type != "cpu" or not 0 < param.numel() < SMALL_NUMEL:
                continue
            if param.is_shared():
                if leaves_shared:
                    continue
                raise ValueError(
                    "flatten=True moves parameters into buffers of this process, but one of shape "
                    f"{tuple(param.shape)} is in shared memory: leave flatten=False, or share the memory "
                    "afterwards"
                )
            members.setdefault((index, param.dtype), []).append(param)
    # One tensor alone gains nothing.
    return [FlatBuffer(chosen) for chosen in members.values() if len(chosen) > 1]
