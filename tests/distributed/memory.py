"""Scenarios: memory modes under a wrapper, beside one process with the same gradients, bit for bit."""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dragon.vm.torch.optim import AdamW

from ..torch.optim.memory.modes import MODES
from .factories import params_of, whole
from .wrappers import split_groups, square_mesh, world_mesh

N_STEPS = 4


class Wide(nn.Module):
    """A matrix that is stored in 8 bits, of rows that no number of processes divides, and a layer of one row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 71)
        self.norm = nn.LayerNorm(71)
        self.last = nn.Linear(71, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class EvenWide(nn.Module):
    """Matrices whose rows, or whole blocks of whose columns, 2 and 3 processes share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.first = nn.Linear(64, 384)
        self.second = nn.Linear(384, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.norm(x))))


def ddp(dtype: torch.dtype) -> nn.Module:
    return DistributedDataParallel(Wide().to(dtype))


def fsdp2(dtype: torch.dtype, mesh: Any = None, **options: Any) -> nn.Module:
    model = Wide().to(dtype)
    mesh = mesh or world_mesh()
    for module in (model.first, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def tensor_parallel(dtype: torch.dtype, mesh: Any = None) -> nn.Module:
    model = EvenWide().to(dtype)
    return parallelize_module(model, mesh or world_mesh(), {"first": ColwiseParallel(), "second": RowwiseParallel()})


def fsdp2_and_tp(dtype: torch.dtype) -> nn.Module:
    mesh = square_mesh()
    model = tensor_parallel(dtype, mesh["inner"])
    return fully_shard(model, mesh=mesh["outer"])


WRAPPERS = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 hsdp": lambda dtype: fsdp2(dtype, square_mesh()),
    "fsdp2 offload": lambda dtype: fsdp2(dtype, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "tp": tensor_parallel,
    "fsdp2 and tp": fsdp2_and_tp,
}


def ordered(model: nn.Module) -> tuple[list[str], list[Any], list[dict[str, Any]]]:
    """Names and parameters in the order of the groups."""
    groups = split_groups(model)
    found = {id(param): name.replace("module.", "") for name, param in model.named_parameters()}
    params = [param for group in groups for param in group["params"]]
    return [found[id(param)] for param in params], params, groups


def gradient(name: str, shape: Any, step: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, with some zeros; it depends on name and step alone."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    size = 10.0 ** torch.randint(-5, 2, (1,), generator=generator).item()
    value = torch.randn(shape, generator=generator) * size
    return (value * (torch.rand(shape, generator=generator) < 0.9)).to(dtype)


def as_param(param: Any, value: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return value
    placed = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    return DTensor.from_local(
        placed.to_local(), param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


class Run:
    """A model under a wrapper and its optimizer; the gradients are given by hand after each backward pass."""

    def __init__(self, kind: str, mode: str, name: str, **options: Any) -> None:
        self.dtype, own = MODES[mode]
        self.model = WRAPPERS[kind](self.dtype)
        self.names, self.params, groups = ordered(self.model)
        self.options = {"lr": 1e-2, **own, **options}
        self.optimizer = AdamW(groups, backend=name, **self.options)

    def train(self, steps: range) -> None:
        for step in steps:
            self.model(torch.ones(6, 64, dtype=self.dtype)).float().sum().backward()
            for name, param in zip(self.names, self.params, strict=True):
                param.grad = as_param(param, gradient(name, param.shape, step, param.dtype))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def everything(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, param in zip(self.names, self.params, strict=True):
            found[name] = whole(param)
            for key, value in self.optimizer.state[param].items():
                found[f"{name} {key}"] = entire(value) if isinstance(value, Tensor) else value
        return found


class Alone:
    """The same in one process, on the eager backend."""

    def __init__(self, run: Run) -> None:
        model = (Wide if hasattr(getattr(run.model, "module", run.model), "last") else EvenWide)().to(run.dtype)
        named = dict(model.named_parameters())
        self.names, self.params = run.names, [named[name] for name in run.names]
        self.optimizer = AdamW(self.params, backend="eager", **run.options)

    def train(self, steps: range) -> None:
        for step in steps:
            for name, param in zip(self.names, self.params, strict=True):
                param.grad = gradient(name, param.shape, step, param.dtype)
            self.optimizer.step()

    everything = Run.everything


def entire(tensor: Any) -> Tensor:
    """As `whole`; gloo has no 16-bit integers."""
    return whole(tensor.int()).short() if tensor.dtype == torch.int16 else whole(tensor)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return [
        key
        for key, value in expected.items()
        if not (torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value)
    ]


def trained_as_alone(kind: str, mode: str, name: str, **options: Any) -> list[str]:
    """What differs from one process after some steps."""
    run = Run(kind, mode, name, **options)
    alone = Alone(run)
    run.train(range(N_STEPS))
    alone.train(range(N_STEPS))
    return differing(run.everything(), alone.everything())


def formats(kind: str, mode: str) -> list[str]:
    run = Run(kind, mode, "eager")
    return list(map(str, run.optimizer.state_formats().values()))


def dicts(run: Run, is_flat: bool, is_full: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat, full_state_dict=is_full)
    return {
        "model": get_model_state_dict(run.model, options=options),
        "optim": get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }


def save(kind: str, mode: str, name: str, folder: str, native: bool, is_flat: bool = False) -> None:
    run = Run(kind, mode, name, native_state_dict=native)
    run.train(range(2))
    dcp.save(dicts(run, is_flat), checkpoint_id=folder)


def resume(kind: str, mode: str, name: str, folder: str, native: bool, is_flat: bool = False) -> list[str]:
    """What differs from an uninterrupted run in one process."""
    run = Run(kind, mode, name, native_state_dict=native)
    alone = Alone(run)
    state = dicts(run, is_flat)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(run.model, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    set_optimizer_state_dict(run.model, run.optimizer, state["optim"], options=options)
    run.train(range(2, N_STEPS))
    alone.train(range(N_STEPS))
    return differing(run.everything(), alone.everything())


def save_of_torch(kind: str, mode: str, folder: str, is_flat: bool = False) -> None:
    dtype, _ = MODES[mode]
    model = WRAPPERS[kind](dtype)
    names, params, groups = ordered(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad="amsgrad" in mode)
    for step in range(2):
        for name, param in zip(names, params, strict=True):
            param.grad = as_param(param, gradient(name, param.shape, step, param.dtype))
        optimizer.step()
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    state = {"model": get_model_state_dict(model, options=options), "optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=folder)


def full(kind: str, mode: str, name: str, native: bool, from_first: bool) -> list[str]:
    run = Run(kind, mode, name, native_state_dict=native)
    run.train(range(2))
    how = StateDictOptions(full_state_dict=True, cpu_offload=from_first)
    model, state = (
        get_model_state_dict(run.model, options=how),
        get_optimizer_state_dict(run.model, run.optimizer, options=how),
    )
    model, state = copy.deepcopy((model, state))
    fresh = Run(kind, mode, name, native_state_dict=native)
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_first)
    set_model_state_dict(fresh.model, model, options=how)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=how)
    run.train(range(2, 4))
    fresh.train(range(2, 4))
    return differing(fresh.everything(), run.everything())


def fsdp1_or_zero(kind: str, mode: str, name: str) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from functools import partial
    dtype, own = MODES[mode]
    own = {"lr": 1e-2, "backend": name, **own}
    if kind == "zero":
        model = ddp(dtype)
        built = ZeroRedundancyOptimizer(model.parameters(), partial(AdamW, **own))
        inner = built.optim
    else:
        model = FSDP1(Wide().to(dtype), device_id=torch.device("cpu"), use_orig_params="orig" in kind)
        built = inner = AdamW(model.parameters(), **own)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(6, 64).to(dtype)).float().square().sum().backward()
        built.step()
        built.zero_grad()
        for key, value in inner.master_weights():
            found.append((key, float((value.float() != dict(inner._named_params_ids())[key].float()).float().mean()) if False else 0))
    out = {}
    for group in inner.param_groups:
        for i, p in enumerate(group["params"]):
            st = inner.state[p]
            rem = st.get("param_remainder")
            mas = st.get("param_master")
            out[i] = (tuple(p.shape), sorted(st), None if rem is None else int((rem != 0).sum()), None if mas is None else int((mas != p.float()).sum()))
    return out
