"""Scenarios: training under a wrapper, beside PyTorch's optimizer there and beside one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dragon.vm.torch import nn as dragon_nn
from dragon.vm.torch.optim import Adam

from .factories import largest_difference, make, own, params_of, whole
from .wrappers import WRAPPERS, EvenNet, Net, Wrapped, backward, backward_alone, batch, world_mesh

N_STEPS = 4
EVEN = ("tp", "sp", "fsdp2 and tp")


# Far above gradients whose sums are rounding errors: Adam would make whole steps of them.
DAMPED = {"eps": 1e-2}


def trained(wrapped: Wrapped, optimizer: Any, copied: Callable[[Any], torch.Tensor] = own) -> list[torch.Tensor]:
    """Copies of the parameters after some steps."""
    for step in range(N_STEPS):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    return list(map(copied, params_of(optimizer)))


def names(wrapped: Wrapped) -> list[str]:
    """The names of the parameters, in the order of the groups, as the model alone has them."""
    found = {id(param): name for name, param in wrapped.model.named_parameters()}
    ordered = [found[id(param)] for group in wrapped.groups for param in group["params"]]
    return [name.replace("module.", "").replace("_fsdp_wrapped_", "") for name in ordered]


def as_with_torch(kind: str, name: str) -> float:
    """How far parameters are from those that PyTorch's fused optimizer trains under the same wrapper."""
    expected_model, model = WRAPPERS[kind](), WRAPPERS[kind]()
    expected = trained(expected_model, make("torch", expected_model.groups))
    before = [own(param) for group in model.groups for param in group["params"]]
    found = trained(model, make(name, model.groups))
    assert largest_difference(found, before) > 0.01, "nothing was trained"
    return largest_difference(found, expected)


def as_alone(kind: str, name: str) -> float:
    """How far parameters are from those that one process trains with PyTorch's optimizer and all the data."""
    wrapped = WRAPPERS[kind]()
    values = trained(wrapped, make(name, wrapped.groups, **DAMPED), whole)
    found = dict(zip(names(wrapped), values, strict=True))
    model = EvenNet() if kind in EVEN else Net()
    optimizer = make("torch", model.parameters(), **DAMPED)
    for step in range(N_STEPS):
        backward_alone(model, wrapped.n_replicas, step)
        optimizer.step()
        optimizer.zero_grad()
    expected = {key: value.detach() for key, value in model.named_parameters()}
    return largest_difference([found[key] for key in expected], list(expected.values()))


def late_groups(name: str) -> float:
    """Layers that join the optimizer after two steps, under FSDP2."""
    runs = []
    for each in ("torch", name):
        wrapped = WRAPPERS["fsdp2"]()
        (params,) = (group["params"] for group in wrapped.groups)
        optimizer = make(each, params[:4])
        for step in range(N_STEPS):
            if step == 2:
                optimizer.add_param_group({"params": params[4:], "lr": 0.01})
            backward(wrapped, step)
            optimizer.step()
            wrapped.model.zero_grad()
        runs.append([own(param) for param in params])
    return largest_difference(*runs)


def joined(name: str) -> float:
    """DDP with fewer batches on some processes, inside its join context."""
    runs = []
    for each in ("torch", name):
        wrapped = WRAPPERS["ddp"]()
        optimizer = make(each, wrapped.groups)
        with Join([wrapped.model]):
            for step in range(2 + dist.get_rank()):
                optimizer.zero_grad()
                backward(wrapped, step)
                optimizer.step()
        runs.append([own(param) for param in params_of(optimizer)])
    return largest_difference(*runs)


def zero_redundancy(name: str) -> tuple[float, int]:
    """ZeRO-1 over DDP: each process updates some of the parameters, and all see all updates."""
    runs = []
    for each in ("torch", name):
        wrapped = WRAPPERS["ddp"]()
        built = ZeroRedundancyOptimizer(wrapped.model.parameters(), partial(built_by, each))
        runs.append(trained(wrapped, built))
        built.consolidate_state_dict(0)
    n_states = len(built.state_dict()["state"]) if dist.get_rank() == 0 else len(runs[0])
    assert n_states == len(runs[0])
    return largest_difference(*runs), len(params_of(built.optim))


def built_by(name: str, params: Any, **options: Any) -> Any:
    return make(name, params, **options)


def pipeline(name: str) -> float:
    """A stage of a pipeline on each process, against PyTorch's optimizer there."""
    runs = []
    rank, n = dist.get_rank(), dist.get_world_size()
    for each in ("torch", name):
        torch.manual_seed(rank)
        module = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.Tanh())
        optimizer = make(each, module.parameters())
        stage = PipelineStage(module, rank, n, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 3, loss_fn=lambda output, target: (output - target).square().sum())
        for step in range(N_STEPS):
            schedule.step(
                *([batch(step)] if rank == 0 else []), **({"target": batch(step, 1)} if rank == n - 1 else {})
            )
            optimizer.step()
            optimizer.zero_grad()
        runs.append([own(param) for param in module.parameters()])
    return largest_difference(*runs)


def dragons(kind: str) -> tuple[bool, float, bool]:
    """Which of Dragon's rules its own parameters follow under a wrapper.

    Returns:
        Whether the optimizer takes Dragon's epsilon, the gradient after a second backward pass by the first one's,
        and whether `zero_grad()` keeps gradients.
    """
    model: torch.nn.Module = torch.nn.Sequential(dragon_nn.Linear(8, 4 * dist.get_world_size(), bias=False))
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind.startswith("fsdp1"):
        has_original = kind == "fsdp1 original parameters"
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=has_original)
    elif kind == "fsdp2":
        fully_shard(model, mesh=world_mesh())
    else:
        parallelize_module(model, world_mesh(), {"0": ColwiseParallel()})
    (param,) = model.parameters()
    optimizer = Adam([param])
    sums = []
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        sums.append(float(own(param.grad).sum()))
    optimizer.zero_grad()
    return optimizer.param_groups[0].get("epsilon_hat", False), sums[1] / sums[0], param.grad is not None
