"""Sums of squares and non-finite flags over all processes that share a model, in stream order.

How a step uses it, between the norm and the advance, on every process, with gradients or without:

    reduction = Reduction(params, process_group)             # once for a set of parameters
    part = reduction.part(positions)                         # once for a plan: those with gradients
    values = part.collapse(squares, found_inf)               # torch operations, or a kernel of the backend
    part.all_reduce(values)                                  # values[0]: the flag, values[1]: the sum

A backend that sums in a kernel of its own writes `values` itself: element 0 is a flag, and element ``1 + lane[i]``
gets ``weight[i] * squares[i]`` of each tensor. Nothing here waits for the device.

`TensorReduction` does the same for the norm of each tensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dragon.vm.torch.optim._distributed.lanes import Lanes, make_lanes


class Reduction:
    """Reduces the sum of all squares and a flag: 16 bytes for each process group.

    It is false if no other process shares the model: nothing is to be called then, and not a bit changes.
    It holds process groups, which copies and pickles cannot: it is made anew for them.

    Args:
        params: all parameters of the optimizer, with a gradient or not. All processes call the same collectives.
        process_group: processes that hold distinct parts of the model beyond what meshes say, or None.

    Attributes:
        lane: for each parameter, the position of its sum; parameters in one lane are summed together.
        weight: for each parameter, the factor of its squares, one over the processes that count the same elements.
        n_lanes: how many sums `values` has.

    Raises:
        TypeError, ValueError: for a `process_group` that is none or does not contain this process, and for a
            parameter that is `Partial`.
    """

    def __init__(self, params: Sequence[Tensor], process_group: Any = None) -> None:
        arranged = make_lanes(params, process_group, per_tensor=False)
        self._lanes = arranged.lanes
        self.n_lanes = max(1, len(arranged.lanes))
        # Without lanes there is one sum, this process's own.
        self.lane = tuple(max(0, index) for index in arranged.lane_index)
        self.weight = arranged.weights
        self._on_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def __bool__(self) -> bool:
        """Whether any other process takes part."""
        return bool(self._lanes)

    def part(self, positions: Sequence[int]) -> Reduction:
        """The reduction for some of the parameters, by the same collectives.

        Args:
            positions: of the parameters that have gradients; there may be none.
        """
        part = object.__new__(Reduction)
        part._lanes, part.n_lanes = self._lanes, self.n_lanes
        part.lane = tuple(self.lane[i] for i in positions)
        part.weight = tuple(self.weight[i] for i in positions)
        part._on_device = {}
        return part

    def collapse(self, squares: Tensor, flag: Tensor | None = None, *, largest: bool = False) -> Tensor:
        """Bring the numbers of single tensors into the form that `all_reduce` takes.

        Args:
            squares: float64 [n_params], sums of squares of local shards; their largest magnitudes for `largest`.
            flag: one number, positive if this process has found something infinite.
            largest: take maxima instead of weighted sums.

        Returns:
            float64 [1 + n_lanes]: the flag, and a number for each lane.
        """
        values = squares.new_zeros(1 + self.n_lanes)
        if flag is not None:
            values[0] = flag.reshape(())
        for lane, (positions, weights) in enumerate(self._tensors(squares.device)):
            chosen = squares if positions.numel() == squares.numel() else squares[positions]
            if chosen.numel():
                values[1 + lane] = chosen.amax() if largest else (chosen * weights).sum()
        return values

    def all_reduce(self, values: Tensor, *, largest: bool = False) -> None:
        """Reduce over all processes, in place and on the current stream.

        Args:
            values: float64 [1 + n_lanes], see `collapse`. Afterwards element 0 is positive if any process's was.
                Element 1 is then the sum over all lanes and processes, or the maximum for `largest`.
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
        if self._lanes and not self._lanes[-1].takes_all:
            for value in sums[:-1]:
                total = join(total, value)
        values[:1], values[1:2] = flag, total

    def _tensors(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Positions and weights of each lane's parameters, copied to a device once."""
        if device not in self._on_device:
            lanes = []
            for lane in range(self.n_lanes):
                positions = [i for i, its in enumerate(self.lane) if its == lane]
                weights = [self.weight[i] for i in positions]
                lanes.append((_indices(positions, device), _numbers(weights, device)))
            self._on_device[device] = lanes
        return self._on_device[device]


class TensorReduction:
    """Reduces the sum of squares of each tensor alone, and a flag: 8 bytes a tensor.

    It is false if no other process holds parts of any tensor, and no `process_group` is given.

    Args:
        params: all parameters of the optimizer, with a gradient or not.
        process_group: as for `Reduction`. It counts for the flag, and for tensors that FSDP1 splits.

    Raises:
        TypeError, ValueError: as `Reduction`.
    """

    def __init__(self, params: Sequence[Tensor], process_group: Any = None) -> None:
        self._arranged: Lanes = make_lanes(params, process_group, per_tensor=True)
        self._on_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def __bool__(self) -> bool:
        """Whether any other process takes part."""
        return bool(self._arranged.lanes)

    def all_reduce(self, values: Tensor) -> None:
        """Reduce over all processes, in place and on the current stream.

        Args:
            values: float64 [1 + n_params], the flag and the sum of squares of each parameter's shard, 0 for one
                without a gradient. Afterwards element 0 is positive if any process's was, and the others are
                the sums of squares of whole tensors.
        """
        for lane, (positions, weights) in zip(self._arranged.lanes, self._tensors(values.device), strict=True):
            if positions.numel() == values.numel():
                _all_reduce_sum(values.mul_(weights), lane.groups)
            else:
                chosen = values[positions].mul_(weights)
                _all_reduce_sum(chosen, lane.groups)
                values[positions] = chosen

    def _tensors(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Positions and weights of each lane's numbers, the flag first, copied to a device once."""
        if device not in self._on_device:
            lanes = []
            for lane in range(len(self._arranged.lanes)):
                positions = [i for i, its in enumerate(self._arranged.lane_index) if its == lane]
                weights = [1.0, *(self._arranged.weights[i] for i in positions)]
                lanes.append((_indices([0, *(1 + i for i in positions)], device), _numbers(weights, device)))
            self._on_device[device] = lanes
        return self._on_device[device]


def all_reduce_flags(flags: Tensor, process_group: Any) -> None:
    """Take maxima of numbers, of which none is NaN, in place and on the current stream."""
    _all_reduce_sum(flags, (process_group,), dist.ReduceOp.MAX)


def _indices(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _numbers(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _all_reduce_sum(values: Tensor, groups: Sequence[Any], op: Any = None) -> None:
    """Reduce a tensor in place over each group in turn."""
    for group in groups:
        types = [device.type for device in group._device_types]
        if values.device.type in types:
            dist.all_reduce(values, op=op or dist.ReduceOp.SUM, group=group)
        else:
            # Shards that FSDP2 offloads to the CPU, in a group whose backend has no CPU side.
            moved = values.to(types[0])
            dist.all_reduce(moved, op=op or dist.ReduceOp.SUM, group=group)
            values.copy_(moved)


def _all_reduce_largest(pair: Tensor, groups: Sequence[Any]) -> None:
    """Take maxima in place; a maximum over processes does not keep NaN, so that one is told apart."""
    nan = torch.isnan(pair[1:])
    triple = torch.cat([pair[:1], nan.to(pair.dtype), pair[1:].masked_fill(nan, 0)])
    _all_reduce_sum(triple, groups, dist.ReduceOp.MAX)
    pair[:1] = triple[:1]
    pair[1:] = triple[2:].masked_fill(triple[1:2] > 0, torch.nan)
