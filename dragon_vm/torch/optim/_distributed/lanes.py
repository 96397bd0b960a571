"""Which process groups a parameter's squares are summed over, and how often they are counted there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from dragon.vm.torch.optim._distributed.hidden import split_by_fsdp1
from dragon.vm.torch.optim._distributed.shards import is_distributed, n_shards


class Lane(NamedTuple):
    """A sum over the processes of one mesh or process group, of some of the parameters.

    Attributes:
        groups: sum over each of them in turn; together they cover the processes. None for this process's own sum.
        weights: by the parameters' positions, one over the number of processes that count the same elements.
        share: part of this sum that each process adds to the sum over `process_group`.
        takes_all: whether this is the sum over `process_group`, to which the others are added.
    """

    groups: tuple[Any, ...]
    weights: dict[int, float]
    share: float = 1.0
    takes_all: bool = False

    def part(self, positions: Sequence[int]) -> Lane:
        """The same sum, of the parameters at some positions, which are counted anew."""
        return self._replace(weights={i: self.weights[at] for i, at in enumerate(positions) if at in self.weights})


def make_lanes(params: Sequence[Tensor], process_group: Any, per_tensor: bool) -> list[Lane]:
    """Arrange parameters by the processes that share them, in an order on which all agree.

    Elements are counted once. A `DTensor` is replicated where its placements say so. A plain parameter is
    replicated within the largest mesh. Within `process_group` a plain parameter is distinct on each process.
    Where FSDP1 manages some parameters, those that it does not split are replicated there.

    Args:
        params: all parameters of the optimizer, with a gradient or not.
        process_group: processes that hold distinct parts of the model beyond what meshes say, or None.
        per_tensor: for the sum of each tensor alone. `process_group` then counts for tensors that FSDP1 splits.

    Raises:
        ValueError: for a parameter that is `Partial`; as `check_meshes`.
    """
    check_meshes(params, process_group, per_tensor)
    members = _ranks_of_group(process_group)
    lanes: dict[tuple[int, ...], Lane] = {}
    found: list[tuple[tuple[int, ...], float]] = []
    split = split_by_fsdp1(params) if members else [None] * len(params)
    has_fsdp1 = any(is_split is not None for is_split in split)
    for param, is_split in zip(params, split, strict=True):
        ranks = _ranks_of_mesh(param)
        weight = 1.0 / _replication(param)
        if not ranks and members and (is_split or not per_tensor):
            ranks, weight = members, 1.0 / len(members) if has_fsdp1 and not is_split else 1.0
        elif members and not per_tensor and set(ranks) <= set(members):
            ranks = members
        if ranks and ranks != members and ranks not in lanes:
            lanes[ranks] = _mesh_lane(param, members)
        found.append((ranks, weight))
    if members:
        lanes[members] = Lane((process_group,), {}, takes_all=not per_tensor)
    elif lanes and not per_tensor:
        # Plain parameters count within the largest mesh, so that all its processes agree.
        largest = max(lanes, key=len)
        found = [(ranks, weight) if ranks else (largest, 1.0 / len(largest)) for ranks, weight in found]
    elif not lanes:
        lanes[()] = Lane((), {})
    for index, (ranks, weight) in enumerate(found):
        # With `per_tensor` the sum of a plain parameter is whole.
        if ranks in lanes:
            lanes[ranks].weights[index] = weight
    return list(lanes.values())


def check_meshes(params: Sequence[Any], process_group: Any, per_tensor: bool) -> None:
    """Check that this process learns the norm of each parameter, on whatever mesh it is.

    Raises:
        ValueError: for one on a mesh without this process, unless `process_group` contains that mesh. For
            `per_tensor`, the norm of each tensor alone, for each such parameter.
    """
    members = set(_ranks_of_group(process_group))
    for param in params:
        if not is_distributed(param) or param.device_mesh.get_coordinate() is not None:
            continue
        if per_tensor or not members.issuperset(param.device_mesh.mesh.flatten().tolist()):
            name, remedy = ("clip_norm", "max_grad_norm and ") if per_tensor else ("a norm", "")
            raise ValueError(
                f"{name} needs whole gradients, but a parameter of shape {tuple(param.shape)} is on "
                f"{param.device_mesh} without this process: give {remedy}process_group with all processes"
            )


def check_process_group(group: Any) -> None:
    """Check a process group, or None.

    Raises:
        TypeError, ValueError: for anything else, and for a group without this process.
    """
    if group is None:
        return
    if not dist.is_available():
        raise ValueError(f"process_group must be None for a PyTorch without torch.distributed, but got {group!r}")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must contain this process, but it got a group of others")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, but got {group!r}")


def has_others(process_group: Any) -> bool:
    """Whether a process group, or None, contains other processes."""
    return bool(_ranks_of_group(process_group))


def _mesh_lane(param: Any, members: tuple[int, ...]) -> Lane:
    mesh = param.device_mesh
    n_shared = len(set(members).intersection(_ranks_of_mesh(param)))
    share = 1.0 / max(1, n_shared)
    world: Any = dist.group.WORLD
    is_world = mesh.ndim > 1 and mesh.size() == dist.get_world_size()
    if is_world and mesh.device_type in {device.type for device in world._device_types}:
        return Lane((world,), {}, share)
    return Lane(tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1), {}, share)


def _ranks_of_mesh(param: Any) -> tuple[int, ...]:
    """The ranks of a parameter's mesh; none for a plain parameter and a mesh of one process."""
    if not is_distributed(param) or param.device_mesh.size() == 1:
        return ()
    return tuple(sorted(param.device_mesh.mesh.flatten().tolist()))


def _ranks_of_group(group: Any) -> tuple[int, ...]:
    """The ranks of a process group; none for None and a group of one process."""
    ranks = [] if group is None else dist.get_process_group_ranks(group)
    return tuple(sorted(ranks)) if len(ranks) > 1 else ()


def _replication(param: Any) -> int:
    """How many processes of a parameter's mesh hold the same elements."""
    if not is_distributed(param):
        return 1
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(f"a parameter must be sharded or replicated, but its placements are {param.placements}")
    return int(param.device_mesh.size()) // n_shards(param)
