"""Scenarios: memory modes under a wrapper, beside one process with the same gradients, bit for bit."""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dragon.vm.torch.optim import AdamW, _release

from ..torch.optim.memory import modes
from .factories import params_of
from .wrappers import split_groups, square_mesh, world_mesh

N_STEPS = 4
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    **modes.MODES,
    "plain": (torch.float32, {}),
    "plain bf16": (torch.bfloat16, {}),
}


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
    return parallelize_module(
        model, mesh or world_mesh(), {"first": ColwiseParallel(), "second": RowwiseParallel()}
    )


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
        placed.to_local(),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


class Run:
    """A model under a wrapper and its optimizer. Gradients are given by hand after the wrapper's own reduction."""

    def __init__(self, kind: str, mode: str, name: str, n_late: int = 0, **options: Any) -> None:
        self.dtype, own = MODES[mode]
        self.model = WRAPPERS[kind](self.dtype)
        self.names, self.params, groups = ordered(self.model)
        # These join the optimizer later.
        self.late = self.params[len(self.params) - n_late :]
        groups[-1]["params"] = groups[-1]["params"][: len(groups[-1]["params"]) - n_late]
        self.options = {"lr": 1e-2, **own, **options}
        # Of fp32 tensors, which "8bit" leaves some, PyTorch's fused operation rounds the last few otherwise.
        rounds_otherwise = name == "native" and mode in ("plain", "plain bf16", "8bit", "8bit to nearest")
        self.step, self.backend = 0, "eager" if rounds_otherwise else name
        self.releases = bool(options.get("release_gradients"))
        if self.releases:
            for name_of, param in zip(self.names, self.params, strict=True):
                # Before the optimizer's hooks.
                param.register_post_accumulate_grad_hook(partial(self.give, name_of))
        self.optimizer = AdamW(groups, backend=self.backend, **self.options)

    def give(self, name: str, param: Any) -> None:
        """Set a gradient as the wrapper would have reduced it."""
        param.grad = as_param(param, gradient(name, param.shape, self.step, param.dtype))

    def backward(self, step: int, *, passes: bool = True) -> None:
        self.step = step
        if passes:
            self.model(torch.ones(6, 64, dtype=self.dtype)).float().sum().backward()
        if not self.releases:
            for name, param in zip(self.names, self.params, strict=True):
                self.give(name, param)

    def train(self, steps: range) -> None:
        # Gradients are given by hand: the wrapper's passes take most of the time, and one shows its hooks.
        for step in steps:
            self.backward(step, passes=self.releases or step == steps.start)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def everything(self) -> dict[str, Any]:
        """What is kept, by name: of a tensor over processes the shards."""
        found: dict[str, Any] = {}
        for name, param in zip(self.names, self.params, strict=True):
            found[name] = param.detach()
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"{name} {key}"] = value.detach() if isinstance(value, Tensor) else value
        return found


class Alone(Run):
    """The same in one process."""

    def __init__(self, run: Run) -> None:
        self.dtype, self.names, self.releases, self.step = run.dtype, run.names, False, 0
        self.model = (Wide if hasattr(getattr(run.model, "module", run.model), "last") else EvenWide)().to(
            run.dtype
        )
        named = dict(self.model.named_parameters())
        self.params = [named[name] for name in run.names]
        first = len(self.params) - len(run.late)
        self.late = self.params[first:]
        self.options = {key: value for key, value in run.options.items() if key != "release_gradients"}
        self.backend = run.backend.replace("triton", "eager")
        self.optimizer = AdamW(self.params[:first], backend=self.backend, **self.options)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return [key for key, value in expected.items() if not is_same(found[key], value)]


def is_same(found: Any, expected: Any) -> bool:
    """Whether a value is the expected one. Of a shard of it, each process sees its own."""
    if not isinstance(found, Tensor):
        return found == expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if isinstance(found, DTensor):
        mesh, placements = found.device_mesh, found.placements
        if not isinstance(expected, DTensor):
            expected = distribute_tensor(expected, mesh, placements, src_data_rank=None)
        if placements != expected.placements:
            return False
        found, expected = found.to_local(), expected.to_local()
    return torch.equal(found, expected)


def unexpected(run: Run, alone: Run) -> list[str]:
    """What differs, but for random words of columns that are cut: they depend on the mesh."""
    cut = {
        name
        for name, param in zip(run.names, run.params, strict=True)
        if any(placement.is_shard(1) for placement in getattr(param, "placements", ()))
    }
    is_stochastic = "stochastic" in str(alone.optimizer.state_formats()) and dist.get_world_size() > 1
    found = differing(run.everything(), alone.everything())
    return [key for key in found if not (is_stochastic and key.split()[0] in cut)]


def all_trained_as_alone(modes: list[str], **arguments: Any) -> dict[str, list[str]]:
    return {mode: trained_as_alone(mode=mode, **arguments) for mode in modes}


def trained_as_alone(kind: str, mode: str, name: str, **options: Any) -> list[str]:
    """What differs from one process after some steps, but for random words of columns that are cut."""
    whole_buckets, _release.BUCKET_BYTES = _release.BUCKET_BYTES, 4096
    try:
        run = Run(kind, mode, name, **options)
        alone = Alone(run)
        run.train(range(N_STEPS))
        alone.train(range(N_STEPS))
    finally:
        _release.BUCKET_BYTES = whole_buckets
    return unexpected(run, alone)


def skipped(kind: str, mode: str, name: str) -> tuple[list[str], int]:
    """What a step changes in which one process has an infinity, and how many were skipped."""
    run = Run(kind, mode, name, skip_nonfinite=True)
    run.train(range(2))
    before = copy.deepcopy(run.everything())
    run.backward(2)
    if dist.get_rank() == dist.get_world_size() - 1:
        shards = [getattr(param.grad, "_local_tensor", param.grad) for param in run.params]
        next(shard for shard in shards if shard.numel()).view(-1)[0] = torch.inf
    run.optimizer.step()
    return differing(run.everything(), before), run.optimizer.n_skipped_steps


def summed(kind: str, mode: str, name: str) -> list[str]:
    """What differs from one process where two gradients are summed before each step."""
    run = Run(kind, mode, name)
    alone = Alone(run)
    for step in range(N_STEPS):
        for each in (run, alone):
            each.backward(step)
            each.optimizer.sum_grad()
            if step % 2:
                each.optimizer.step()
    return differing(run.everything(), alone.everything())


def under_fsdp1(options: dict[str, Any], is_original: bool) -> str:
    """What is said of storage options under FSDP1."""
    model = FSDP1(Wide(), device_id=torch.device("cpu"), use_orig_params=is_original)
    try:
        AdamW(model.parameters(), **options)
    except ValueError as error:
        return str(error)
    return "accepted"


def hidden_masters(kind: str, mode: str, name: str) -> tuple[int, int]:
    """Elements whose masters a wrapper's own writes cost, and those of which masters have more than parameters."""
    dtype, own = MODES[mode]
    own = {"backend": name, **own, "lr": 1e-4}
    if kind == "zero":
        model: nn.Module = ddp(dtype)
        built = ZeroRedundancyOptimizer(model.parameters(), partial(_built, **own))
        optimizer = built.optim
    else:
        model = FSDP1(Wide().to(dtype), device_id=torch.device("cpu"), use_orig_params=kind != "fsdp1")
        built = optimizer = AdamW(model.parameters(), **own)
    kept: list[Tensor] = []
    n_lost = 0
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(6, 64).to(dtype)).float().square().sum().backward()
        masters = [value.clone() for _, value in optimizer.master_weights()]
        n_lost += sum(int((a != b).sum()) for a, b in zip(kept, masters, strict=False))
        built.step()
        built.zero_grad()
        kept = [value.clone() for _, value in optimizer.master_weights()]
    n_kept = sum(int((a != b).sum()) for a, b in zip(kept, params_of(optimizer), strict=True))
    return n_lost, n_kept


def _built(params: Any, **options: Any) -> Any:
    return AdamW(params, **options)
