"""Sums of squares and non-finite flags over all processes that share a model, in stream order.

A step takes them between the norm and the advance, on every process, with gradients or without. Nothing here waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dragon.vm.torch.optim._devices import has_float64
from dragon.vm.torch.optim._distributed.lanes import Lane
from dragon.vm.torch.optim._distributed.shards import local


def _on_devices(weights: list[dict[int, float]]) -> Callable[[torch.device], list[tuple[Tensor, Tensor]]]:
    """What gives each lane's int64 positions and float64 weights on a device, copied there once."""

    @cache
    def on(device: torch.device) -> list[tuple[Tensor, Tensor]]:
        tensor = partial(torch.tensor, device=device)
        pairs = [([*own], [*own.values()]) for own in weights]
        return [(tensor(own, dtype=torch.int64), tensor(values, dtype=torch.float64)) for own, values in pairs]

    return on


class Reduction:
    """Reduces the sum of all squares and a flag: 16 bytes for each process group.

    It is false if no other process shares the model: nothing is to be called then, and not a bit changes.
    It holds process groups, which copies and pickles cannot: it is made anew for them.

    Args:
        lanes: of all parameters of the optimizer, with a gradient or not: all processes call the same collectives.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._tensors_on = _on_devices([lane.weights for lane in lanes])

    def __bool__(self) -> bool:
        """Whether any other process takes part."""
        return any(lane.groups for lane in self._lanes)

    def part(self, positions: Sequence[int]) -> Reduction:
        """The reduction for some of the parameters, or for none, by the same collectives."""
        return Reduction([lane.part(positions) for lane in self._lanes])

    def collapse(self, squares: Tensor, flag: Tensor | None = None, *, largest: bool = False) -> Tensor:
        """Bring the numbers of single tensors into the form that `all_reduce` takes.

        Args:
            squares: float64 [n_params], sums of squares of local shards; their largest magnitudes for `largest`.
            flag: one number, positive if this process has found something infinite.
            largest: take maxima instead of weighted sums.

        Returns:
            float64 [1 + number of lanes]: the flag, and a sum for each lane.
        """
        tensors = self._tensors_on(squares.device)
        values = squares.new_zeros(1 + len(tensors))
        if flag is not None:
            values[0] = flag
        for lane, (positions, weights) in enumerate(tensors):
            chosen = squares if positions.numel() == squares.numel() else squares[positions]
            if chosen.numel():
                values[1 + lane] = chosen.amax() if largest else (chosen * weights).sum()
        return values

    def all_reduce(self, values: Tensor, *, largest: bool = False) -> None:
        """Reduce over all processes, in place and on the current stream.

        Args:
            values: as `collapse` returns them. Afterwards element 0 is positive if any process's was. Element 1 is
                then the sum over all lanes and processes, or the maximum for `largest`.
            largest: take maxima. NaN is larger than any number.
        """
        reduce = _all_reduce_largest if largest else _all_reduce_sum
        join = torch.maximum if largest else torch.add
        if len(self._lanes) == 1:
            reduce(values, self._lanes[0].groups)
            return
        flag, sums = values[:1], list(values[1:].split(1))
        for index, lane in enumerate(self._lanes):
            if lane.takes_all:
                for earlier, value in zip(self._lanes, sums[:index], strict=False):
                    sums[index] = join(sums[index], value if largest else value * earlier.share)
            pair = torch.cat([flag, sums[index]])
            reduce(pair, lane.groups)
            flag, sums[index] = pair.split(1)
        total = sums[-1]
        if not self._lanes[-1].takes_all:
            for value in sums[:-1]:
                total = join(total, value)
        values[:1], values[1:2] = flag, total


class TensorReduction:
    """Reduces the sum of squares of each tensor alone, and a flag: 8 bytes a tensor.

    It is false if no other process holds parts of any tensor, and no `process_group` is given.

    Args:
        lanes: of all parameters of the optimizer, made with `per_tensor`.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        # The flag stands first, and is summed with every lane.
        weights = ({1 + i: weight for i, weight in lane.weights.items()} for lane in lanes)
        self._tensors_on = _on_devices([{0: 1.0, **own} for own in weights])

    def __bool__(self) -> bool:
        """Whether any other process takes part."""
        return any(lane.groups for lane in self._lanes)

    def all_reduce(self, values: Tensor) -> None:
        """Reduce over all processes, in place and on the current stream.

        Args:
            values: float64 [1 + n_params], the flag and the sum of squares of each parameter's shard, 0 for one
                without a gradient. Afterwards element 0 is positive if any process's was, and the others are
                the sums of squares of whole tensors.
        """
        for lane, (positions, weights) in zip(self._lanes, self._tensors_on(values.device), strict=True):
            if positions.numel() == values.numel():
                _all_reduce_sum(values.mul_(weights), lane.groups)
            else:
                chosen = values[positions].mul_(weights)
                _all_reduce_sum(chosen, lane.groups)
                values[positions] = chosen


def meeting_device(tensors: Iterable[Tensor], process_group: Any = None) -> torch.device:
    """Where this process reduces fp64 numbers with others: a group may have one backend for each type of device.

    Args:
        tensors: parameters or gradients. One on an accelerator decides, wherever the others are.
        process_group: decides for a process without tensors: the accelerator if it has NCCL.
    """
    devices = {local(tensor).device: None for tensor in tensors}
    if not devices and process_group is not None and "nccl" in dist.get_backend_config(process_group):
        return torch.device("cuda", torch.cuda.current_device())
    usable = (device for device in devices if device.type not in ("cpu", "meta") and has_float64(device))
    return next(usable, torch.device("cpu"))


def all_reduce_flags(flags: Tensor, process_group: Any) -> None:
    """Take maxima of numbers, of which none is NaN, in place and on the current stream."""
    _all_reduce_sum(flags, (process_group,), dist.ReduceOp.MAX)


def _all_reduce_sum(values: Tensor, groups: Sequence[Any], op: Any = None) -> None:
    """Reduce a tensor in place over each group in turn."""
    for group in groups:
        types = [device.type for device in group._device_types]
        # FSDP2 offloads shards to the CPU, also in a group whose backend has no CPU side.
        moved = values if values.device.type in types else values.to(types[0])
        dist.all_reduce(moved, op=op or dist.ReduceOp.SUM, group=group)
        if moved is not values:
            values.copy_(moved)


def _all_reduce_largest(pair: Tensor, groups: Sequence[Any]) -> None:
    """Take maxima in place; a maximum over processes does not keep NaN, so that one is told apart."""
    triple = torch.cat([pair[:1], torch.isnan(pair[1:]).to(pair.dtype), pair[1:]])
    _all_reduce_sum(triple, groups, dist.ReduceOp.MAX)
    pair[:1] = triple[:1]
    pair[1:] = triple[2:].masked_fill(triple[1:2] > 0, torch.nan)
