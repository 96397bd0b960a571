"""Scenarios: gradients that several backward passes sum before they are reduced."""

import copy
import gc
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from .factories import largest_difference, make, params_of, whole
from .training import DAMPED, EVEN, N_STEPS, names
from .watching import Watch
from .wrappers import WRAPPERS, EvenNet, Net, backward, backward_alone

N_PARTS = 3
# The gradients of all parameters, in bytes: what one reduction of them moves.
LARGE = 256


def accumulated(kind: str, name: str, is_last_synchronized: bool = True, **options: Any) -> tuple[float, int]:
    """How far parameters are from one process's with the sum of all parts, and large collectives in a step."""
    wrapped, model = WRAPPERS[kind](), EvenNet() if kind in EVEN else Net()
    optimizer = make(name, wrapped.groups, **DAMPED, **options)
    expected = make("clipping", model.parameters(), **DAMPED, **options)
    for step in range(N_STEPS):
        with Watch() as watch:
            for part in range(N_PARTS):
                is_last = part == N_PARTS - 1
                with nullcontext() if is_last and is_last_synchronized else wrapped.unsynchronized():
                    backward(wrapped, step, part)
                if name != "clipping":
                    optimizer.sum_grad()
            optimizer.step()
        optimizer.zero_grad()
        for part in range(N_PARTS):
            backward_alone(model, wrapped.n_replicas, step, part)
        expected.step()
        expected.zero_grad()
    found = dict(zip(names(wrapped), map(whole, params_of(optimizer)), strict=True))
    pairs = [(found[key], value.detach()) for key, value in model.named_parameters()]
    n_large = sum(nbytes > LARGE for operation, nbytes in watch.collectives if operation.startswith("allreduce"))
    return largest_difference(*map(list, zip(*pairs, strict=True))), n_large


def small_parts(name: str, dtype: torch.dtype, first: float) -> float:
    """The sum of a first gradient and 299 ones."""
    param = nn.Parameter(torch.zeros(8, dtype=dtype))
    model = nn.parallel.DistributedDataParallel(_Scaled(param))
    optimizer = make(name, model.parameters())
    for value in (first, *[1.0] * 299):
        with model.no_sync():
            model(torch.full((8,), value, dtype=dtype)).sum().backward()
        optimizer.sum_grad()
    # There is none now.
    optimizer.sum_grad()
    optimizer.step()
    # The first moment is a tenth of the gradient.
    return float(optimizer.state[param]["exp_avg"][0]) / 0.1


class _Scaled(nn.Module):
    def __init__(self, param: nn.Parameter) -> None:
        super().__init__()
        self.param = param

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.param * x


def never_reduced(kind: str, name: str, is_among_replicas: bool = False) -> str:
    """What is said of a step after backward passes of which none was synchronized, or not among replicas."""
    wrapped = WRAPPERS[kind]()
    optimizer = make(name, wrapped.groups)
    if is_among_replicas:
        wrapped.model.set_requires_all_reduce(False)
    with nullcontext() if is_among_replicas else wrapped.unsynchronized():
        backward(wrapped, 0)
    try:
        optimizer.sum_grad()
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"


def joined_sums(name: str, is_earlier: bool) -> tuple[str, float]:
    """What is said inside of `Join` of sums from there or from before, and the first moment behind it."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = make(name, model.parameters())

    def take() -> None:
        with model.no_sync():
            model(torch.ones(2, 3)).sum().backward()
        optimizer.sum_grad()

    if is_earlier:
        take()
    text = "accepted"
    # Whoever leaves early is waited for.
    with Join([model]):
        try:
            optimizer.step() if is_earlier else take()
        except RuntimeError as error:
            text = str(error)
        for _ in range(1 + dist.get_rank()):
            model(torch.ones(2, 3)).sum().backward()
            model.zero_grad()
    with Join([model], enable=False):
        optimizer.zero_grad()
        if not is_earlier:
            take()
        optimizer.step()
    return text, float(optimizer.state[model.module.bias]["exp_avg"])


def wrapped_anew(name: str) -> list[float]:
    """Weights after sums of gradients that differ by process, of a model that is wrapped for each anew."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = make(name, model.parameters())
    for _ in range(2):
        wrapper = nn.parallel.DistributedDataParallel(model)
        with wrapper.no_sync():
            wrapper(torch.eye(3)[: 1 + dist.get_rank()]).square().sum().backward()
        optimizer.sum_grad()
        optimizer.step()
        del wrapper
        gc.collect()
    return model.weight[0].tolist()


def wrapped_later(name: str) -> list[float]:
    """Weights after sums of gradients that differ by process, of a model that is wrapped after a first sum."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = make(name, model.parameters())
    model(torch.eye(3)).square().sum().backward()
    optimizer.sum_grad()
    optimizer.step()
    wrapper = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        with wrapper.no_sync():
            wrapper(torch.eye(3)[: 1 + dist.get_rank()]).square().sum().backward()
        optimizer.sum_grad()
        optimizer.step()
    return model.weight[0].tolist()


def looked_at_between(name: str) -> list[float]:
    """Weights after steps in which a forward pass without gradients comes between backward pass and `sum_grad`."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = make(name, model.parameters())
    x = torch.randn(2, 3) * (1 + dist.get_rank()) - dist.get_rank()
    for _ in range(2):
        with model.no_sync():
            model(x).square().sum().backward()
        with torch.no_grad():
            model(x)
        optimizer.sum_grad()
        optimizer.step()
    return model.module.weight[0].tolist()


def scaled_sums(kind: str, name: str, has_group: bool) -> tuple[str, list[float], list[bool]]:
    """What is said of a scaler that finds sums, the scales, and at which steps this process's parameters changed.

    At one step a gradient is infinite, on the first process alone.
    """
    wrapped = WRAPPERS[kind]()
    params = params_of(optimizer := make(name, wrapped.groups))
    if has_group:
        optimizer = make(name, params, process_group=wrapped.model.process_group)
    scaler = ShardedGradScaler("cpu", init_scale=16.0, growth_interval=1000)
    scales, changes = [], []
    for step in range(3):
        before = [whole(param) for param in params]
        backward(wrapped, step, scale=float(scaler.scale(torch.ones(()))))
        if step == 1 and dist.get_rank() == 0:
            next(param.grad for param in params if param.numel()).view(-1)[0] = torch.inf
        optimizer.sum_grad()
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            return str(error), scales, changes
        scaler.update()
        scales.append(scaler.get_scale())
        changes.append(not all(map(torch.equal, before, params)))
    return "accepted", scales, changes


def partly_used(name: str, is_last_synchronized: bool) -> tuple[list[float], list[float], list[float | None]]:
    """Values of parameters of which each process uses others in each part, mean gradients, and those found."""
    n, rank = dist.get_world_size(), dist.get_rank()
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    model = nn.parallel.DistributedDataParallel(_Chosen(params), find_unused_parameters=True)
    optimizer = make(name, model.parameters())
    expected = [0.0] * 3
    for part in range(2):
        is_synchronized = part == 1 and is_last_synchronized
        used = [1 + (each + is_synchronized) % 2 for each in range(n)]
        with nullcontext() if is_synchronized else model.no_sync():
            model(used[rank]).backward()
        optimizer.sum_grad()
        expected = [mean + used.count(index) / n for index, mean in enumerate(expected)]
    optimizer.step()
    assert not any(param.grad is not None for param in params)
    return [float(param.detach()[0]) for param in params], expected, gradients_of(optimizer, params)


def gradients_of(optimizer: Any, params: list[nn.Parameter]) -> list[float | None]:
    """The gradients of the first step, of which the first moments are a tenth; None where there was none."""
    return [float(state["exp_avg"][0]) / 0.1 if (state := optimizer.state.get(p)) else None for p in params]


def used_by_one(name: str) -> list[float | None]:
    """Gradients of parameters that the first process of each group uses all, and the others none but one."""
    n_groups = dist.get_world_size() // 2
    groups = [dist.new_group([first, first + n_groups]) for first in range(n_groups)]
    group = groups[dist.get_rank() % n_groups]
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    model = nn.parallel.DistributedDataParallel(_Chosen(params), process_group=group)
    optimizer = make(name, model.parameters())
    with model.no_sync():
        for index in range(1 if dist.get_rank(group) else 3):
            (model(index) * (1 + dist.get_rank() % n_groups)).backward()
    optimizer.sum_grad()
    optimizer.step()
    return gradients_of(optimizer, params)


def saved_in_part(name: str) -> list[str]:
    """What is said of saving sums that other processes have their parts of, and of saving after the step."""
    wrapped = WRAPPERS["ddp"]()
    optimizer = make(name, wrapped.groups)
    with wrapped.unsynchronized():
        backward(wrapped, 0)
    optimizer.sum_grad()
    texts = []
    for save in (optimizer.state_dict, partial(copy.deepcopy, optimizer)):
        try:
            save()
        except RuntimeError as error:
            texts.append(str(error))
    optimizer.step()
    optimizer.state_dict()
    return texts


class _Chosen(nn.Module):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, index: int) -> torch.Tensor:
        return self.params[index].sum()


def partial_sums(name: str, placement: str) -> tuple[list[float], list[float]]:
    """A parameter after a step of gradients that other processes have parts of: summed, and in `.grad`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = [Shard(0) if placement == "shard" else Replicate()]
    found = []
    for is_summed in (True, False):
        param = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, placements))
        optimizer = make(name, [param])
        total = torch.zeros(6)
        for part in range(3):
            own = torch.arange(6.0) * (1 + dist.get_rank()) + part
            total += own
            gradient = DTensor.from_local(own if is_summed else total.clone(), mesh, [Partial()])
            param.grad = gradient
            if is_summed:
                optimizer.sum_grad()
        optimizer.step()
        found.append(param.full_tensor().tolist())
    return found[0], found[1]
