"""Small models under each of PyTorch's wrappers, and the batches that they train on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel


class Wrapped(NamedTuple):
    """A model under a wrapper.

    Attributes:
        model: what the forward pass calls.
        groups: parameter groups, plain and distributed parameters apart: PyTorch's optimizer cannot mix them.
        replica: which share of the data this process has.
        n_replicas: how many shares there are.
        unsynchronized: a context in which gradients are not reduced.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    replica: int
    n_replicas: int
    unsynchronized: Callable[[], AbstractContextManager[Any]] = nullcontext


class Net(nn.Module):
    """Sizes that no number of processes divides, and a last layer of one row: shards are uneven and empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.second = nn.Linear(13, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(self.norm(self.first(x)))))


class EvenNet(nn.Module):
    """Sizes that tensor parallelism divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(7)
        self.first = nn.Linear(7, 12)
        self.second = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.norm(x))))


def split_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = [param for param in model.parameters() if param.requires_grad]
    plain = [param for param in params if not isinstance(param, DTensor)]
    distributed = [param for param in params if isinstance(param, DTensor)]
    return [{"params": group} for group in (plain, distributed) if group]


# A worker has one process group for its life, and each new mesh of two dimensions would make more of them.
@cache
def world_mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def square_mesh() -> Any:
    """Two dimensions; with a prime number of processes one of them is 1."""
    n = dist.get_world_size()
    first = 2 if n % 2 == 0 else 1
    return init_device_mesh("cpu", (first, n // first), mesh_dim_names=("outer", "inner"))


def data_parallel(model: nn.Module, **kwargs: Any) -> Wrapped:
    return Wrapped(model, split_groups(model), dist.get_rank(), dist.get_world_size(), **kwargs)


def ddp(**options: Any) -> Wrapped:
    model = DistributedDataParallel(Net(), **options)
    return data_parallel(model, unsynchronized=model.no_sync)


def fsdp1(**options: Any) -> Wrapped:
    model = FSDP1(Net(), device_id=torch.device("cpu"), **options)
    return data_parallel(model, unsynchronized=model.no_sync)


def fsdp2(mesh: Any = None, dtype: torch.dtype = torch.float32, frozen: bool = False, **options: Any) -> Wrapped:
    model = Net().to(dtype)
    if frozen:
        model.first.requires_grad_(False)
    mesh = mesh or world_mesh()
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, **options)

    class Unsynchronized(AbstractContextManager[None]):
        def __enter__(self) -> None:
            model.set_requires_gradient_sync(False)

        def __exit__(self, *_: Any) -> None:
            model.set_requires_gradient_sync(True)

    return data_parallel(model, unsynchronized=Unsynchronized)


def fsdp2_ignoring() -> Wrapped:
    """FSDP2 without the norm layer, whose plain parameters DDP would keep equal; here all ranks have one batch."""
    model = Net()
    fully_shard(model, mesh=world_mesh(), ignored_params=set(model.norm.parameters()))
    return Wrapped(model, split_groups(model), 0, 1)


def tensor_parallel(mesh: Any = None) -> Wrapped:
    """The norm layer stays plain."""
    model = EvenNet()
    parallelize_module(model, mesh or world_mesh(), {"first": ColwiseParallel(), "second": RowwiseParallel()})
    return Wrapped(model, split_groups(model), 0, 1)


def sequence_parallel(mesh: Any = None) -> Wrapped:
    """The norm layer is replicated, and each process sees some of the rows."""
    model = EvenNet()
    mesh = mesh or world_mesh()
    model.register_forward_pre_hook(lambda _, args: (distribute_tensor(args[0], mesh, [Shard(0)]),))
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "first": ColwiseParallel(input_layouts=Shard(0)),
        "second": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return Wrapped(model, split_groups(model), 0, 1)


def fsdp2_and_tp() -> Wrapped:
    mesh = square_mesh()
    wrapped = sequence_parallel(mesh["inner"])
    fully_shard(wrapped.model, mesh=mesh["outer"])
    groups = split_groups(wrapped.model)
    return Wrapped(wrapped.model, groups, mesh.get_local_rank("outer"), mesh["outer"].size())


WRAPPERS: dict[str, Callable[[], Wrapped]] = {
    "ddp": ddp,
    "ddp static graph": lambda: ddp(static_graph=True),
    "ddp bucket view": lambda: ddp(gradient_as_bucket_view=True),
    "fsdp1": fsdp1,
    "fsdp1 original parameters": lambda: fsdp1(use_orig_params=True),
    "fsdp1 whole": lambda: fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD),
    "fsdp2": fsdp2,
    "fsdp2 hsdp": lambda: fsdp2(square_mesh()),
    "fsdp2 bf16 policy": lambda: fsdp2(
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "fsdp2 bf16": lambda: fsdp2(dtype=torch.bfloat16),
    "fsdp2 offload": lambda: fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp2 frozen": lambda: fsdp2(frozen=True),
    "fsdp2 ignored": fsdp2_ignoring,
    "tp": tensor_parallel,
    "sp": sequence_parallel,
    "fsdp2 and tp": fsdp2_and_tp,
}


def batch(step: int, part: int = 0, replica: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 100 * part + replica)
    return torch.randn(12, 7, generator=generator)


def backward(wrapped: Wrapped, step: int, part: int = 0, scale: float = 1.0) -> None:
    """One backward pass of this process's share of a batch."""
    dtype = next(iter(wrapped.model.parameters())).dtype
    x = batch(step, part, wrapped.replica).to(dtype)
    (wrapped.model(x).float().square().sum() * scale).backward()


def backward_alone(model: nn.Module, n_replicas: int, step: int, part: int = 0, scale: float = 1.0) -> None:
    """What all processes do together, by one: the mean over the shares of a batch."""
    for replica in range(n_replicas):
        (model(batch(step, part, replica)).square().sum() * (scale / n_replicas)).backward()
