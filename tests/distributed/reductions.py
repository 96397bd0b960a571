"""Scenarios: the package for shards, placements and sums, without an optimizer."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from dragon.vm.torch.optim._distributed.lanes import check_process_group, make_lanes
from dragon.vm.torch.optim._distributed.placement import GradientPlacements
from dragon.vm.torch.optim._distributed.reduction import Reduction, TensorReduction
from dragon.vm.torch.optim._distributed.shards import local

from .factories import whole
from .watching import Watch
from .wrappers import WRAPPERS, backward, square_mesh, world_mesh

# Sums in float64 in another order, and weights like 1/3.
TOLERANCE = 1e-14


def together(params: Any, group: Any = None) -> Reduction:
    return Reduction(make_lanes(params, group, per_tensor=False))


def each_alone(params: Any, group: Any) -> TensorReduction:
    return TensorReduction(make_lanes(params, group, per_tensor=True))


def squares_of(shards: Any) -> Tensor:
    return torch.stack([shard.double().square().sum() for shard in shards])


def largest_of(shards: Any) -> Tensor:
    return torch.stack(
        [shard.double().abs().amax() if shard.numel() else torch.zeros(()).double() for shard in shards]
    )


def group_of(wrapped: Any) -> Any:
    """The group that a user would give: where tensors do not show that they are split."""
    return getattr(wrapped.model, "process_group", None) if hasattr(wrapped.model, "clip_grad_norm_") else None


def with_gradients(kind: str) -> tuple[list[Any], list[Any], Any]:
    wrapped = WRAPPERS[kind]()
    backward(wrapped, 0)
    params = [param for group in wrapped.groups for param in group["params"]]
    # FSDP1 leaves parameters without a gradient whose elements are all on other processes.
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    shards = GradientPlacements(params).shards(params, grads)
    return params, list(shards), group_of(wrapped)


def whole_squares(kind: str, params: list[Any], shards: list[Any], group: Any) -> list[Tensor]:
    """The sum of squares of each whole gradient, by collectives of its own."""
    if group is None or kind == "fsdp1 whole":
        return [whole(param.grad).double().square().sum() for param in params]
    sums = squares_of(shards)
    dist.all_reduce(sums, group=group)
    return list(sums)


def reduced(reduction: Any, values: Tensor, **options: Any) -> Tensor:
    """Reduce under watch: one small collective, and no wait."""
    with Watch() as watch:
        reduction.all_reduce(values, **options)
    assert watch.waits == []
    assert bool(reduction) == bool(watch.collectives)
    # All processes are a group, also where their mesh has two dimensions.
    assert len(watch.collectives) <= 1, watch.collectives
    assert all(
        nbytes <= max(64, values.nbytes * isinstance(reduction, TensorReduction))
        for _, nbytes in watch.collectives
    )
    return values


def sums(kind: str) -> tuple[float, list[float], tuple[float, float]]:
    """All numbers that a step may ask for, against those of whole gradients."""
    prepared = with_gradients(kind)
    return total(kind, *prepared), each(kind, *prepared), maximum(*prepared)


def findings(kind: str) -> list[tuple[float, float]]:
    """What all processes see of a flag and a non-finite number that one of them has."""
    prepared = with_gradients(kind)
    return [flags(*prepared), maximum(*prepared, poison=math.inf), maximum(*prepared, poison=math.nan)]


def total(kind: str, params: list[Any], shards: list[Any], group: Any) -> float:
    reduction = together(params, group)
    expected = float(sum(whole_squares(kind, params, shards, group)))
    values = reduced(reduction, reduction.collapse(squares_of(shards)))
    assert math.isclose(float(values[1]), expected, rel_tol=TOLERANCE), (float(values[1]), expected)
    assert float(values[0]) == 0
    return float(values[1])


def each(kind: str, params: list[Any], shards: list[Any], group: Any) -> list[float]:
    expected = torch.stack(whole_squares(kind, params, shards, group))
    values = torch.cat([torch.zeros(1).double(), squares_of(shards)])
    reduced(each_alone(params, group), values)
    torch.testing.assert_close(values[1:], expected, rtol=TOLERANCE, atol=0)
    return values[1:].tolist()


def maximum(params: list[Any], shards: list[Any], group: Any, poison: float = 0.0) -> tuple[float, float]:
    reduction = together(params, group)
    local_norms = largest_of(shards)
    expected = local_norms.amax().clone()
    dist.all_reduce(expected, dist.ReduceOp.MAX)
    last = dist.get_rank() == dist.get_world_size() - 1
    if poison and last:
        local_norms[0] = poison
    flag = torch.tensor([1.0 if poison and last else 0.0])
    values = reduced(reduction, reduction.collapse(local_norms, flag, largest=True), largest=True)
    if not poison:
        assert float(values[1]) == float(expected)
    return float(values[0]), float(values[1])


def flags(params: list[Any], shards: list[Any], group: Any) -> tuple[float, float]:
    reduction = together(params, group)
    first = dist.get_rank() == 0
    squares = squares_of(shards)
    if first:
        squares[-1] = torch.inf
    values = reduced(reduction, reduction.collapse(squares, torch.tensor(float(first))))
    return float(values[0] > 0), float(values[1])


def bits(kind: str) -> bool:
    """Whether in one process nothing is reduced, and a sum keeps its bits."""
    params, shards, group = with_gradients(kind)
    reduction = together(params, group)
    squares = squares_of(shards)
    values = reduction.collapse(squares)
    before = values.clone()
    reduction.all_reduce(values)
    same = torch.equal(values[1], squares.sum()) and torch.equal(values, before)
    return same and not reduction and not each_alone(params, group)


def without_gradients() -> float:
    """One process has no gradients at all, and takes part."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    reduction = together(params, dist.group.WORLD)
    present = [] if dist.get_rank() == 0 else [1]
    part = reduction.part(present)
    values = part.collapse(torch.full((len(present),), 4.0, dtype=torch.float64))
    return float(reduced(part, values)[1])


def sharded(value: Tensor, mesh: Any, *placements: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(value, mesh, placements))


def mixed() -> tuple[float, float, float]:
    """Parameters on the whole mesh, on each of its dimensions, and plain: the sum, and that in one process.

    Last the sum where one process has an infinity in the plain one.
    """
    mesh = square_mesh()
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(5, 6, generator=generator) for _ in range(6)]
    params = [
        sharded(values[0], mesh, Shard(0), Shard(1)),
        sharded(values[1], mesh, Replicate(), Shard(0)),
        sharded(values[2], mesh["outer"], Shard(0)),
        sharded(values[3], mesh["inner"], Shard(1)),
        sharded(values[4], mesh["inner"], Replicate()),
        nn.Parameter(values[5]),
    ]
    # In another order, as a plan may have them.
    reduction = together(params[::-1]).part(range(len(params))[::-1])
    squares = squares_of(map(local, params))
    result = reduction.collapse(squares)
    reduction.all_reduce(result)
    assert float(result[0]) == 0
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if is_last:
        squares[-1] = torch.inf
    spoilt = reduction.collapse(squares, torch.tensor(float(is_last)))
    reduction.all_reduce(spoilt)
    assert float(spoilt[0]) > 0
    expected = float(sum(value.double().square().sum() for value in values))
    return float(result[1]), expected, float(spoilt[1])


def stages() -> list[tuple[float, float]]:
    """Two pipeline stages, each with parameters on a mesh of its own: the sums in two groups, and those expected.

    In the group of equal shares of the stages there are also a parameter on all processes, and a plain one.
    """
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("stage", "data"))
    stage = mesh.get_local_rank("stage")
    values = [torch.arange(float(7 + i)) + i for i in range(4)]
    mine = values[2 * stage : 2 * stage + 2]
    params = [sharded(mine[0], mesh["data"], Shard(0)), sharded(mine[1], mesh["data"], Replicate())]
    everywhere, plain = torch.arange(30.0).view(5, 6), torch.full((3,), 1.0 + stage)
    more = [sharded(everywhere, mesh, Shard(0), Shard(1)), nn.Parameter(plain)]
    found = []
    for group, own, others in (
        (dist.group.WORLD, params, []),
        (mesh.get_group("stage"), params + more, [everywhere, torch.full((3,), 1.0), torch.full((3,), 2.0)]),
    ):
        reduction = together(own, group)
        result = reduction.collapse(squares_of(map(local, own)))
        reduction.all_reduce(result)
        found.append((float(result[1]), float(sum(value.double().square().sum() for value in values + others))))
    return found


def overlapping() -> tuple[float, float]:
    """A group of some processes of a mesh adds nothing: they have one sum already."""
    half = dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    value = torch.arange(30.0).reshape(5, 6)
    params = [sharded(value, world_mesh(), Shard(0))]
    reduction = together(params, groups[dist.get_rank() // half])
    result = reduction.collapse(squares_of(map(local, params)))
    reduction.all_reduce(result)
    largest = reduction.collapse(largest_of(map(local, params)), largest=True)
    reduction.all_reduce(largest, largest=True)
    assert float(largest[1]) == float(value.amax())
    return float(result[1]), float(value.double().square().sum())


def zero_partitions() -> float:
    """Each process has other parameters, and another number of them."""
    params = [nn.Parameter(torch.ones(2 + i)) for i in range(1 + dist.get_rank())]
    reduction = together(params, dist.group.WORLD)
    result = reduction.collapse(squares_of(params))
    return float(reduced(reduction, result)[1])


def refusals() -> dict[str, str]:
    mesh = world_mesh()
    partial = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    in_part = nn.Parameter(DTensor.from_local(torch.ones(2), square_mesh(), [Replicate(), Partial()]))
    other = dist.new_group([0])
    attempts = {
        "partial": lambda: together([partial]),
        "in part": lambda: together([in_part]),
        "no group": lambda: check_process_group("world"),
        "others": lambda: check_process_group(other if dist.get_rank() else "world"),
    }
    texts = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            texts[name] = "nothing was refused"
        except (TypeError, ValueError) as error:
            texts[name] = str(error)
    return texts
