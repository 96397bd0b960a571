"""Scenarios: parameters that are updated in the backward pass under a wrapper."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dragon.vm.torch.optim import _release
from dragon.vm.torch.optim._distributed import owners
from dragon.vm.torch.optim._distributed.shards import mean_shard_nbytes

from .factories import largest_difference, make, params_of, whole
from .training import N_STEPS, trained
from .watching import Watch
from .wrappers import WRAPPERS, backward, world_mesh

# Buckets of one or two shards.
SMALL = 64


def released(kind: str, name: str, **options: Any) -> tuple[float, int]:
    """How far parameters are from those of the plain step, and the gradients that a backward pass left."""
    whole_buckets, _release.BUCKET_BYTES = _release.BUCKET_BYTES, SMALL
    try:
        expected = WRAPPERS[kind]()
        values = trained(expected, make(name, expected.groups, **options))
        wrapped = WRAPPERS[kind]()
        optimizer = make(name, wrapped.groups, release_gradients=True, **options)
        found = trained(wrapped, optimizer)
        backward(wrapped, 0)
        n_left = sum(param.grad is not None for param in params_of(optimizer))
    finally:
        _release.BUCKET_BYTES = whole_buckets
    return largest_difference(found, values), n_left


def scaled(kind: str, name: str) -> tuple[list[float], bool, list[tuple[str, int]]]:
    """The scales of a scaler, at which steps a tensor changed, and the collectives of a backward pass.

    At one step the gradient of that tensor is infinite, on the last process alone.
    """
    whole_buckets, _release.BUCKET_BYTES = _release.BUCKET_BYTES, SMALL
    try:
        wrapped = WRAPPERS[kind]()
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
        param = wrapped.model.second.weight
        is_poisoned = False

        # Registered before the optimizer's.
        def poison(param: Any) -> None:
            if is_poisoned and dist.get_rank() == dist.get_world_size() - 1:
                param.grad._local_tensor[0, 0] = torch.inf

        param.register_post_accumulate_grad_hook(poison)
        optimizer = make(name, wrapped.groups, release_gradients=scaler)
        scales, changes = [], []
        for step in range(N_STEPS):
            before, is_poisoned = whole(param), step == 1
            with Watch() as watch:
                backward(wrapped, step, scale=float(scaler.scale(torch.ones(()))))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            changes.append(not torch.equal(whole(param), before))
    finally:
        _release.BUCKET_BYTES = whole_buckets
    return scales, changes, watch.collectives


def searches(name: str) -> int:
    """How often steps look for gradients that FSDP2 has not reduced, where all were released."""
    found: list[str] = []

    def instances(module: str, kind: str) -> Iterator[Any]:
        found.append(kind)
        yield from plain(module, kind)

    plain, owners.instances = owners.instances, instances
    try:
        wrapped = WRAPPERS["fsdp2"]()
        trained(wrapped, make(name, wrapped.groups, release_gradients=True))
    finally:
        owners.instances = plain
    return found.count("FSDPParamGroup")


class _Rows(nn.Module):
    """Parameters of which processes get different numbers of rows, in an order that makes the last one decide."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterList(nn.Parameter(torch.ones(rows, 8)) for rows in (2, 2, 3))

    def forward(self) -> torch.Tensor:
        total = torch.zeros(())
        for param in self.params:
            total = total + param.sum()
        return total


def uneven(name: str, bucket_bytes: int) -> tuple[list[int], list[float]]:
    """The sizes of buckets where shards are uneven, and parameters after steps that clip each norm."""
    whole_buckets, _release.BUCKET_BYTES = _release.BUCKET_BYTES, bucket_bytes
    try:
        model = _Rows()
        fully_shard(model)
        optimizer = make(name, model.parameters(), release_gradients=True, clip_norm=1.0)
        for _ in range(2):
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
        sizes = [len(bucket.ids) for bucket in optimizer._release._buckets]
        return sizes, [float(whole(param)[0, 0]) for param in model.params]
    finally:
        _release.BUCKET_BYTES = whole_buckets


def shard_nbytes() -> list[float]:
    """Mean bytes of shards by which buckets are filled, of 8 elements in fp32."""
    placements = Replicate(), Shard(0), _StridedShard(0, split_factor=2)
    return [mean_shard_nbytes(distribute_tensor(torch.zeros(8), world_mesh(), [each])) for each in placements]


def all_released(name: str) -> tuple[list[float], list[bool], bool]:
    """The scales of a scaler, at which steps a layer changed, and whether gradients are left for the scaler.

    At one step a gradient is infinite, on the last process alone. The last bucket is frozen after the first step,
    and another one keeps its gradients from then on.
    """
    whole_buckets, _release.BUCKET_BYTES = _release.BUCKET_BYTES, SMALL
    try:
        wrapped = WRAPPERS["fsdp2"]()
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
        params = list(wrapped.model.parameters())
        is_poisoned = False

        def poison(param: Any) -> None:
            if is_poisoned and dist.get_rank() == dist.get_world_size() - 1:
                param.grad._local_tensor[0, 0] = torch.inf

        weight = wrapped.model.second.weight
        weight.register_post_accumulate_grad_hook(poison)
        optimizer = make(name, wrapped.groups, release_gradients=scaler)
        kept = optimizer._release._buckets[-1].params
        scales, changes, are_left = [], [], False
        for step in range(N_STEPS):
            before, is_poisoned = whole(weight), step == 2
            backward(wrapped, step, scale=float(scaler.scale(torch.ones(()))))
            if step:
                are_left |= any(param.grad is not None for param in params)
            scaler.step(optimizer)
            scaler.update()
            for param in kept:
                param.requires_grad_(False)
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            changes.append(not torch.equal(whole(weight), before))
    finally:
        _release.BUCKET_BYTES = whole_buckets
    return scales, changes, are_left


def wrapped_later(name: str) -> list[str]:
    """What is said of each backward pass where a model is wrapped in DDP after the first one."""
    model = nn.Linear(3, 1)
    optimizer = make(name, model.parameters(), release_gradients=True)
    texts = []
    for step in range(3):
        forward = nn.parallel.DistributedDataParallel(model) if step else model
        try:
            forward(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            texts.append("accepted")
        except RuntimeError as error:
            texts.append(str(error))
    return texts


def refused(kind: str, name: str) -> str:
    """What is said of a wrapper that reduces later."""
    wrapped = WRAPPERS[kind]()
    try:
        optimizer = make(name, wrapped.groups, release_gradients=True)
        backward(wrapped, 0)
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"
