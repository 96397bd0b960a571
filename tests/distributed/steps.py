"""Scenarios: steps with norms, skipped steps and scalers."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._plan import widening

from .factories import largest_difference, make, own, params_of, whole
from .training import DAMPED, EVEN, N_STEPS, names
from .watching import Watch
from .wrappers import WRAPPERS, EvenNet, Net, Wrapped, backward, backward_alone, world_mesh

MAX_NORM = 1.0
# Norms above the bound and below it, by turns.
SCALES = (1.0, 1e-3)


def group_options(wrapped: Wrapped) -> dict[str, Any]:
    """The process group that FSDP1 needs, for its parameters do not show that they are split."""
    model = wrapped.model
    return {"process_group": model.process_group} if hasattr(model, "clip_grad_norm_") else {}


def clipped_as_with_torch(kind: str, name: str) -> tuple[float, list[float]]:
    """How far parameters are from those of `clip_grad_norm_` and PyTorch's step, and the norms."""
    theirs, ours = WRAPPERS[kind](), WRAPPERS[kind]()
    expected = make("torch", theirs.groups, **DAMPED)
    optimizer = make(name, ours.groups, max_grad_norm=MAX_NORM, **DAMPED, **group_options(ours))
    norms = []
    for step in range(2):
        for wrapped in (theirs, ours):
            backward(wrapped, step, scale=SCALES[step % 2])
        clip = getattr(theirs.model, "clip_grad_norm_", None)
        found = clip(MAX_NORM) if clip else nn.utils.clip_grad_norm_(params_of(expected), MAX_NORM)
        for each in (expected, optimizer):
            each.step()
            each.zero_grad()
        norms.append(float(optimizer.grad_norm))
        assert abs(norms[-1] - float(whole(found))) <= 1e-5 * norms[-1]
    assert max(norms) > MAX_NORM > min(norms)
    return largest_difference(*([own(p) for p in params_of(each)] for each in (optimizer, expected))), norms


def clipped_as_alone(kind: str, name: str, norm_type: float = 2.0) -> tuple[float, list[float]]:
    """How far parameters are from those of one process that clips whole gradients, and the norms."""
    wrapped, model = WRAPPERS[kind](), EvenNet() if kind in EVEN else Net()
    options: dict[str, Any] = {"max_grad_norm": MAX_NORM, "norm_type": norm_type, **DAMPED}
    optimizer = make(name, wrapped.groups, **options, **group_options(wrapped))
    expected = make("clipping", model.parameters(), **options)
    norms = []
    for step in range(N_STEPS):
        backward(wrapped, step, scale=SCALES[step % 2])
        backward_alone(model, wrapped.n_replicas, step, scale=SCALES[step % 2])
        for each in (optimizer, expected):
            each.step()
            each.zero_grad()
        norms.append(float(optimizer.grad_norm))
        assert abs(norms[-1] - float(expected.grad_norm)) <= 1e-5 * norms[-1]
    found = dict(zip(names(wrapped), map(whole, params_of(optimizer)), strict=True))
    pairs = [(found[key], value.detach()) for key, value in model.named_parameters()]
    return largest_difference(*map(list, zip(*pairs, strict=True))), norms


def clipped_by_tensor_as_alone(kind: str, name: str) -> float:
    """The same with a bound on the norm of each tensor."""
    wrapped, model = WRAPPERS[kind](), EvenNet() if kind in EVEN else Net()
    optimizer = make(name, wrapped.groups, clip_norm=0.1, **DAMPED)
    expected = make("torch", model.parameters(), **DAMPED)
    for step in range(N_STEPS):
        backward(wrapped, step, scale=SCALES[step % 2])
        backward_alone(model, wrapped.n_replicas, step, scale=SCALES[step % 2])
        for param in model.parameters():
            nn.utils.clip_grad_norm_([param], 0.1)
        for each in (optimizer, expected):
            each.step()
            each.zero_grad()
    found = dict(zip(names(wrapped), map(whole, params_of(optimizer)), strict=True))
    return max(float((found[key] - value).abs().max()) for key, value in model.named_parameters())


def poison(optimizer: Any) -> None:
    """Make one element of one process's shard infinite."""
    if dist.get_rank() == dist.get_world_size() - 1:
        grads = [param.grad for param in params_of(optimizer) if param.grad is not None]
        shards = [getattr(grad, "_local_tensor", grad) for grad in grads]
        next(shard for shard in shards if shard.numel()).view(-1)[0] = torch.inf


def skipped(kind: str, name: str, **options: Any) -> list[int]:
    """The steps that were skipped; a skipped one changes no parameter."""
    wrapped = WRAPPERS[kind]()
    optimizer = make(name, wrapped.groups, skip_nonfinite=True, **options, **group_options(wrapped))
    counts = []
    for step in range(N_STEPS):
        backward(wrapped, step)
        if step % 2:
            poison(optimizer)
        before = [own(param) for param in params_of(optimizer)]
        optimizer.step()
        optimizer.zero_grad()
        difference = largest_difference([own(param) for param in params_of(optimizer)], before)
        assert (difference == 0) == bool(step % 2), difference
        counts.append(int(optimizer.n_skipped_steps))
    return counts


def scaled(kind: str, name: str, **options: Any) -> tuple[float, float]:
    """How far parameters are from PyTorch's with a scaler that sees an infinity, and the scale."""
    runs = []
    for each in ("torch", name):
        wrapped = WRAPPERS[kind]()
        optimizer = make(each, wrapped.groups, **(options if each == name else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        for step in range(N_STEPS):
            backward(wrapped, step, scale=float(scaler.scale(torch.ones(()))))
            if step == 1:
                poison(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(([own(param) for param in params_of(optimizer)], scaler.get_scale()))
    assert runs[0][1] == runs[1][1]
    return largest_difference(runs[1][0], runs[0][0]), runs[1][1]


def scaled_apart(name: str, has_missing: bool, **options: Any) -> tuple[list[float], list[bool], bool]:
    """The scales, and at which steps a stage changed, where each process has a stage of its own.

    At step 1 the gradient is infinite on the first process alone. At step 2 it has none if `has_missing`.
    The last value tells whether a gradient is left there that nobody computed.
    """
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = make(name, [param], process_group=dist.group.WORLD, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    scales, changes, is_left = [], [], False
    for step in range(4):
        before = param.detach().clone()
        optimizer.zero_grad()
        is_first = dist.get_rank() == 0
        loss = scaler.scale((param * (torch.inf if step == 1 and is_first else 1.0)).sum())
        is_missing = has_missing and step == 2 and is_first
        if not is_missing:
            loss.backward()
        scaler.step(optimizer)
        scaler.update()
        is_left |= is_missing and param.grad is not None
        scales.append(scaler.get_scale())
        changes.append(not torch.equal(param, before))
    return scales, changes, is_left


def unscaled_apart(name: str, case: str) -> tuple[str, bool]:
    """What is said of `unscale_` where each process has a stage of its own, and whether the stage changed.

    The first process has an infinity, or no gradient, or neither; "sharded": its scaler asks the others.
    """
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = make(name, [param], process_group=dist.group.WORLD)
    scaler = (ShardedGradScaler if case == "sharded" else torch.amp.GradScaler)("cpu", init_scale=16.0)
    is_first = dist.get_rank() == 0
    is_infinite = case in ("infinite", "sharded") and is_first
    loss = scaler.scale((param * (torch.inf if is_infinite else 1.0)).sum())
    if not (case == "missing" and is_first):
        loss.backward()
    text = "accepted"
    try:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    except RuntimeError as error:
        text = str(error)
    return text, not torch.equal(param, torch.ones(4, 3))


def counted(kind: str, name: str, **options: Any) -> tuple[list[tuple[str, int]], list[str], int]:
    """The collectives of a step, what it read on the host, and the number of parameters."""
    wrapped = WRAPPERS[kind]()
    optimizer = make(name, wrapped.groups, **options, **(group_options(wrapped) if options else {}))
    for step in range(2):
        backward(wrapped, step)
        with Watch() as watch:
            optimizer.step()
        optimizer.zero_grad()
    return watch.collectives, watch.waits, len(params_of(optimizer))


def without_gradients(name: str) -> list[float]:
    """The first process has no gradients, and the norm is that of the others."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = make(name, [param], max_grad_norm=MAX_NORM, process_group=dist.group.WORLD)
    for _ in range(2):
        param.grad = torch.full((4,), 3.0) if dist.get_rank() else None
        optimizer.step()
    assert bool(param.any()) == (dist.get_rank() > 0)
    return [float(optimizer.grad_norm), param.tolist()[0]]


def clipped_without_gradients(name: str) -> list[float]:
    """Norms where `clip_norm` bounds each tensor: all have gradients, then all but the first, then none."""
    mesh = world_mesh()
    params = [nn.Parameter(distribute_tensor(torch.zeros(5), mesh, [Shard(0)])) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "grad_scale": 2.0}]
    optimizer = make(name, groups, clip_norm=1.0, skip_nonfinite=True)
    norms = []
    for first in (0, 1, dist.get_world_size()):
        for param in params:
            grad = distribute_tensor(torch.ones(5), mesh, [Shard(0)])
            param.grad = grad if dist.get_rank() >= first else None
        optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 2.0), torch.zeros(1)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


def scaled_with_other_placements(name: str, grouped: bool) -> tuple[float, int]:
    """The scale and skipped steps behind an infinity in one shard, where the first gradient is replicated."""
    mesh = world_mesh()
    group = {"process_group": dist.group.WORLD} if grouped else {}
    placements = [Replicate()], [Shard(0)]
    params = [nn.Parameter(distribute_tensor(torch.zeros(4), mesh, each)) for each in placements]
    optimizer = make(name, params, fused=True, **group)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for param, value in zip(params, (torch.ones(4), torch.tensor([torch.inf, 0, 0, 0])), strict=True):
        param.grad = distribute_tensor(value, mesh, param.placements)
    scaler.step(optimizer)
    scaler.update()
    assert not any(whole(param).any() for param in params)
    return scaler.get_scale(), optimizer.n_skipped_steps


def scaled_without_gradients(name: str, norm_type: float) -> list[int]:
    """The first process has no gradients, and skips what the others skip for their scaler's sake."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = make(name, [param], norm_type=norm_type, process_group=dist.group.WORLD)
    skipped = []
    for found_inf in (0.0, 1.0):
        param.grad = torch.ones(4) if dist.get_rank() else None
        optimizer.grad_scale = torch.full((1,), 2.0)
        optimizer.found_inf = torch.full((1,), found_inf * (dist.get_rank() > 0))
        optimizer.step()
        skipped.append(optimizer.n_skipped_steps)
    return skipped


def infinite_without_gradients(name: str, norm_type: float) -> list[int]:
    """The first process has no gradients, and skips what the others skip for an infinite one."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = make(name, [param], norm_type=norm_type, skip_nonfinite=True, process_group=dist.group.WORLD)
    skipped = []
    for value in (1.0, torch.inf):
        param.grad = torch.full((4,), value) if dist.get_rank() else None
        optimizer.step()
        skipped.append(optimizer.n_skipped_steps)
    return skipped


def other_gradients_each_step(name: str, **options: Any) -> int:
    """The number of parameters that most plans are for, of an optimizer that has the bits of one without plans.

    Parameters are split unevenly, some are not split, and each process has gradients of its own choice.
    """
    widening.N_MISSED = 1
    mesh, shapes = world_mesh(), ((7, 3), (5,), (2, 2), (40,))
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
    runs = []
    for _ in range(2):
        tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        runs.append([nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in tensors[:3]])
        runs[-1].append(nn.Parameter(tensors[3]))
    optimizers = [make(name, params, **options) for params in runs]
    generator = torch.Generator().manual_seed(dist.get_rank())
    # A step of interpreted kernels takes 40 ms.
    for number in range(7 if name == "triton" else 12):
        grads = [torch.randn(shards.shape, generator=generator) for shards in map(local, runs[0])]
        present = [number == 0 or bool(torch.rand((), generator=generator) < 0.5) for _ in grads]
        for params in runs:
            for param, grad, is_present in zip(params, grads, present, strict=True):
                own = grad.to(param.dtype)
                spec = getattr(param, "_spec", None)
                given = own if spec is None else DTensor(own, spec, requires_grad=False)
                param.grad = given if is_present else None
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(*runs, strict=True):
            assert torch.equal(local(ours), local(theirs))
        norms = [optimizer.grad_norm for optimizer in optimizers]
        assert norms[0] is None or torch.equal(*norms)
        optimizers[1]._updater.plans.forget()
    return max(
        len(plan.gatherer.positions) for plan in optimizers[0]._updater.plans.latest() if plan.gatherer.takes_parts
    )


def extreme(name: str, size: float) -> tuple[float, float]:
    """The norm of float64 gradients of one size, and PyTorch's."""
    mesh = world_mesh()
    param = nn.Parameter(distribute_tensor(torch.zeros(7, 3, dtype=torch.float64), mesh, [Shard(0)]))
    optimizer = make(name, [param], max_grad_norm=MAX_NORM)
    param.grad = distribute_tensor(torch.full((7, 3), size, dtype=torch.float64), mesh, [Shard(0)])
    theirs = whole(nn.utils.get_total_norm([param.grad]))
    optimizer.step()
    return float(optimizer.grad_norm), float(theirs)


def calls_of_a_step(name: str, n_params: int, is_distributed: bool) -> int:
    """Calls of Python functions, and of C functions from Python, in a step like the one before."""
    mesh = world_mesh()
    tensors = [torch.ones(4, 2) for _ in range(n_params)]
    if is_distributed:
        tensors = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]
    params = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = make(name, params)
    n_calls = 0

    def count(*event: Any) -> None:
        nonlocal n_calls
        n_calls += event[1] in ("call", "c_call")

    for _ in range(4):
        for param, tensor in zip(params, tensors, strict=True):
            # As FSDP2 does, which gives gradients the specs of their parameters.
            spec = getattr(tensor, "_spec", None)
            param.grad = (
                torch.ones(4, 2) if spec is None else DTensor(tensor._local_tensor + 1, spec, requires_grad=False)
            )
        n_calls = 0
        sys.setprofile(count)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return n_calls


def scaled_beside_nothing(name: str, n_empty: int) -> list[float]:
    """The scales of a `GradScaler` on each process, of which only the first has elements, and its step counts.

    It finds an infinite gradient at the second of three steps. The others have empty parameters, or none at all.
    """
    is_first = dist.get_rank() == 0
    params = [nn.Parameter(torch.ones(3))] if is_first else [nn.Parameter(torch.ones(0)) for _ in range(n_empty)]
    optimizer = make(name, [{"params": params}], process_group=dist.group.WORLD)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    scales = []
    for step in range(3):
        scaler.scale(torch.ones(()))
        for param in params:
            param.grad = torch.full_like(param, torch.inf if step == 1 else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return [*scales, *(float(entries["step"]) for entries in optimizer.state.values() if "step" in entries)]


def placed_anew(name: str) -> list[float]:
    """The norms of a sharded parameter, which then is replicated, and of a gradient of ones."""
    mesh = world_mesh()
    param, other = (
        nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [placement])) for placement in (Shard(0), Replicate())
    )
    optimizer = make(name, [param], max_grad_norm=1.0)
    norms = []
    for _ in range(2):
        param.grad = distribute_tensor(torch.ones(6), mesh, param.placements)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
        param.grad = None
        optimizer.state.clear()
        torch.utils.swap_tensors(param, other)
    return norms
