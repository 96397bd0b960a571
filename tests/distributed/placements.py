"""Scenarios: gradients and states that lie otherwise than their parameters, and the cost of looking."""

import copy
import io
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from dragon.vm.torch.optim._distributed.placement import GradientPlacements, placed_like, ready_grad
from dragon.vm.torch.optim._distributed.shards import distributed_like, local, locals_of

from .factories import make, whole
from .watching import Watch
from .wrappers import WRAPPERS, square_mesh, world_mesh


def replicated(numel: int = 8) -> tuple[Any, Any]:
    mesh = world_mesh()
    return mesh, nn.Parameter(distribute_tensor(torch.zeros(numel), mesh, [Replicate()]))


def partial_and_pending() -> None:
    """A summand becomes the sum, and a pending collective is waited for, alone and in bulk."""
    mesh, param = replicated()
    rank, n = dist.get_rank(), dist.get_world_size()
    summand = torch.arange(8.0) * (rank + 1)
    expected = torch.arange(8.0) * sum(range(1, n + 1))
    partial = DTensor.from_local(summand, mesh, [Partial()])
    pending = partial.redistribute(placements=[Replicate()], async_op=True)
    for grad in (partial, pending):
        found: Any = ready_grad(param, grad)
        assert found.placements == (Replicate(),)
        assert type(found._local_tensor) is torch.Tensor
        assert torch.equal(found._local_tensor, expected), found
    grads = [
        partial,
        DTensor.from_local(summand, mesh, [Partial()]).redistribute(placements=[Replicate()], async_op=True),
    ]
    pair = [param, param]
    placements = GradientPlacements(pair)
    waiting = [DTensor.from_local(summand, mesh, [Partial()]) for _ in pair]
    waiting = [grad.redistribute(placements=[Replicate()], async_op=True) for grad in waiting]
    for found in (*placements.shards(pair, grads), *GradientPlacements(pair).shards(pair, waiting)):
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)
    assert torch.equal(partial._local_tensor, summand), "the gradient itself was changed"


def missing() -> None:
    """Parameters without a gradient, plain and distributed, at changing positions."""
    mesh, distributed = replicated(2)
    params = [distributed, nn.Parameter(torch.zeros(2)), distributed, nn.Parameter(torch.zeros(2))]
    for placement, expected in ((Partial(), float(dist.get_world_size())), (Replicate(), 1.0)):
        placed = DTensor.from_local(torch.ones(2), mesh, [placement])
        grads = [placed, torch.ones(2), placed, torch.ones(2)]
        placements = GradientPlacements(params)
        for missing in ((0, 3), (1, 2), (), (0, 1, 2, 3), (0, 3), (0, 3)):
            given = [None if i in missing else grad for i, grad in enumerate(grads)]
            for i, shard in enumerate(placements.shards(params, given)):
                if i in missing:
                    assert shard is None
                else:
                    assert shard.tolist() == [1.0 if i % 2 else expected] * 2


def replaced() -> None:
    """Gradients that come as before, of parameters that lie otherwise than those before."""
    mesh = square_mesh()
    params = [
        nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, placements))
        for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)])
    ]
    grad = distribute_tensor(torch.arange(8.0).view(4, 2), mesh, params[0].placements)
    placements = GradientPlacements(params[:1])
    for param in (params[0], params[0], params[1], params[0]):
        (shard,) = placements.shards([param], [grad])
        assert torch.equal(shard, grad.redistribute(placements=param.placements)._local_tensor)


def pending_plain() -> None:
    """A collective's result as the gradient of a plain parameter."""
    import torch.distributed._functional_collectives as collectives

    param = nn.Parameter(torch.zeros(4))
    pending = collectives.all_reduce(torch.ones(4), "sum", dist.group.WORLD)
    assert type(pending).__name__ == "AsyncCollectiveTensor"
    (shard,) = GradientPlacements([param]).shards([param], [pending])
    assert type(shard) is torch.Tensor
    assert shard.tolist() == [dist.get_world_size()] * 4


def mismatches() -> None:
    mesh, distributed = replicated(2)
    plain = nn.Parameter(torch.zeros(2))
    placed = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"plain tensor of shape .*gradient is a DTensor"):
        GradientPlacements([plain]).shards([plain], [placed])
    with pytest.raises(ValueError, match=r"a DTensor .*gradient is a plain tensor"):
        GradientPlacements([distributed]).shards([distributed], [torch.ones(2)])
    with pytest.raises(ValueError, match="both must be DTensors or neither"):
        GradientPlacements([distributed, plain]).shards([distributed, plain], [torch.ones(2), torch.ones(2)])
    elsewhere = DTensor.from_local(torch.ones(2), square_mesh(), [Replicate(), Replicate()])
    with pytest.raises(ValueError, match="its gradient on"):
        ready_grad(distributed, elsewhere)


def known_gradients(kind: str) -> None:
    """In the steady state no Python function is called for a tensor, and nothing is communicated."""
    from .wrappers import backward

    wrapped = WRAPPERS[kind]()
    params = [param for group in wrapped.groups for param in group["params"]]
    placements = GradientPlacements(params)
    calls: list[int] = []
    for step in range(3):
        backward(wrapped, step)
        grads = [param.grad for param in params]
        n_calls = 0

        def count(*event: Any) -> None:
            nonlocal n_calls
            n_calls += 1

        with Watch() as watch:
            sys.setprofile(count)
            try:
                found = placements.shards(params, grads)
                locals_of(params)
            finally:
                sys.setprofile(None)
        calls.append(n_calls)
        assert watch.collectives == []
        assert all(shard is local(grad) for shard, grad in zip(found, grads, strict=True))
        for param in params:
            param.grad = None
    # A fixed number whatever the number of parameters: 9 here, 4 where DTensor is not imported.
    assert calls[-1] < 60, calls


def many_gradients(n_params: int) -> int:
    """Calls for gradients that come as they did before, of which half are distributed."""
    mesh = world_mesh()
    spread = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(n_params // 2)]
    params = [*spread, *(nn.Parameter(torch.ones(4)) for _ in range(n_params // 2))]
    grads = [torch.ones_like(param) for param in params]
    placements = GradientPlacements(params)
    placements.shards(params, grads)
    events: list[Any] = []
    sys.setprofile(lambda *event: events.append(event[1]))
    try:
        placements.shards(params, grads)
    finally:
        sys.setprofile(None)
    return len(events)


def states() -> None:
    """States of shards are distributed as their parameters, save and copy, and take values placed otherwise."""
    for kind in ("fsdp2", "fsdp2 hsdp", "fsdp2 offload", "tp", "fsdp2 and tp"):
        wrapped = WRAPPERS[kind]()
        for param in (param for group in wrapped.groups for param in group["params"]):
            shard = torch.full_like(local(param.detach()), 2.0, dtype=torch.float64)
            state = distributed_like(param, shard)
            assert local(state) is shard
            assert (state.shape, state.stride(), state.dtype) == (param.shape, param.stride(), torch.float64)
            assert getattr(state, "placements", None) == getattr(param, "placements", None)
            saved = io.BytesIO()
            torch.save(state, saved)
            copied = copy.deepcopy(state)
            saved.seek(0)
            loaded = torch.load(saved, weights_only=False)
            assert torch.equal(local(copied), shard)
            assert torch.equal(local(loaded), shard)
            assert state.is_contiguous() == param.is_contiguous()
            whole = torch.arange(param.numel(), dtype=torch.float64).reshape(param.shape)
            with Watch() as watch:
                placed = placed_like(state, whole)
            assert watch.collectives == []
            assert getattr(placed, "placements", None) == getattr(param, "placements", None)
            assert local(placed).shape == shard.shape
            assert torch.equal(placed_like(whole, placed), whole)
            assert placed_like(state, placed) is placed


def states_placed_otherwise() -> None:
    mesh = world_mesh()
    value = torch.arange(30.0).reshape(5, 6)
    target = distribute_tensor(value, mesh, [Shard(0)])
    for other in (
        distribute_tensor(value, mesh, [Shard(1)]),
        distribute_tensor(value, square_mesh(), [Shard(0), Shard(1)]),
    ):
        placed = placed_like(target, other)
        assert placed.placements == (Shard(0),)
        assert torch.equal(placed._local_tensor, target._local_tensor)
    partial = DTensor.from_local(torch.ones(5, 6), mesh, [Partial()])
    assert torch.equal(placed_like(torch.zeros(5, 6), partial), torch.full((5, 6), float(dist.get_world_size())))


def shards_of_other_layouts() -> None:
    param = nn.Parameter(distribute_tensor(torch.zeros(4 * dist.get_world_size()), world_mesh(), [Shard(0)]))
    with pytest.raises(ValueError, match="storage offset 0, but got 3"):
        distributed_like(param, torch.zeros(7)[3:])
    with pytest.raises(ValueError, match=r"shape \(4,\), but got \(5,\)"):
        distributed_like(param, torch.zeros(5))
    n_rows = 4 * dist.get_world_size()
    rows = distributed_like(param, torch.zeros(4, 3), torch.Size((n_rows, 3)))
    assert (rows.shape, rows.stride()) == ((n_rows, 3), (3, 1))


def left_behind(name: str, scale: float | None) -> None:
    """Gradients that lie otherwise are zeroed by the step, or stay behind it unscaled as others do."""
    mesh = world_mesh()
    for given in (Replicate(), Partial(), Shard(0), Shard(1)):
        params = [nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])) for _ in range(2)]
        optimizer = make(name, params)
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor([scale]), torch.zeros(1)
        whole_grad = torch.arange(15.0).view(5, 3)
        placed = distribute_tensor(whole_grad, mesh, [given])
        # One of them lies as its parameter does, or there is none.
        for missing in (False, True):
            params[0].grad = placed.clone()
            params[1].grad = None if missing else distribute_tensor(whole_grad, mesh, [Shard(0)])
            optimizer.step(zero_grad=scale is None)
            expected = torch.zeros(5, 3) if scale is None else whole_grad / scale
            for param in params[: 1 if missing else 2]:
                assert torch.equal(whole(param.grad), expected), (given, whole(param.grad))
