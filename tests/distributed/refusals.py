"""Scenarios: what is refused at construction, and what looks alike and is not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

from dragon.vm.torch.optim import AdamW
from dragon.vm.torch.optim._distributed.hidden import hidden_sharding
from dragon.vm.torch.optim._groups.sharding import check_sharding
from dragon.vm.torch.optim._options import Settings

from .factories import make, whole
from .wrappers import WRAPPERS, world_mesh

KINDS = ("fsdp1", "fsdp1 original parameters", "fsdp1 whole", "fsdp2", "tp")
NORMS: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "clip_norm": {"clip_norm": 1.0},
}


def outcome(build: Callable[[], Any]) -> str:
    try:
        build()
    except ValueError as error:
        return str(error)
    return "accepted"


def zero(name: str, **options: Any) -> Any:
    params = WRAPPERS["ddp"]().model.parameters()
    return ZeroRedundancyOptimizer(params, partial(_built, name, **options))


def _built(name: str, params: Any, **options: Any) -> Any:
    return make(name, params, **options)


def hidden_in_one_layer(**options: Any) -> str | None:
    layer = FSDP1(nn.Linear(8, 8), device_id=torch.device("cpu"), **options)
    return hidden_sharding(list(layer.parameters()))


def beside_a_mesh(name: str) -> tuple[dict[str, str], float]:
    """What is said of norms of parameters on a mesh without the last process, and the norm in `process_group`."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size() - 1)))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Shard(0)], src_data_rank=None))
    # The first one is on all processes.
    params = [nn.Parameter(distribute_tensor(torch.zeros(2), world_mesh(), [Shard(0)])), sharded]
    group = {"process_group": dist.group.WORLD}
    found = {
        f"{norm}{' group' * len(more)}": outcome(partial(make, name, params, **options, **more))
        for norm, options in NORMS.items()
        for more in ({}, group)
    }
    optimizer = make(name, params, max_grad_norm=1.0, **group)
    sharded.grad = torch.ones_like(sharded)
    optimizer.step()
    return found, float(optimizer.grad_norm)


def constructions(name: str) -> dict[str, str]:
    """The text of the error, or "accepted", of each construction."""
    world = dist.group.WORLD
    found = {
        "flatten " + kind: outcome(partial(wrapped, kind, name, flatten=True))
        for kind in ("ddp", "fsdp2", "tp", "fsdp1")
    }
    scaler = torch.amp.GradScaler("cpu")
    found |= {
        f"release {kind} {release is True}": outcome(
            partial(wrapped, kind, name, release_gradients=release, process_group=world)
        )
        for kind in ("tp", "fsdp2")
        for release in (True, scaler)
    }
    for option, norm in NORMS.items():
        for kind in ("fsdp1", "fsdp1 original parameters", "fsdp1 whole", "fsdp2", "tp", "ddp"):
            found[f"{option} {kind}"] = outcome(partial(wrapped, kind, name, **norm))
        for kind in ("fsdp1", "fsdp1 original parameters"):
            found[f"{option} {kind} group"] = outcome(partial(wrapped, kind, name, process_group=world, **norm))
        found[f"{option} zero"] = outcome(lambda norm=norm: zero(name, **norm))
        found[f"{option} zero group"] = outcome(lambda norm=norm: zero(name, process_group=world, **norm))
    return found


def wrapped(kind: str, name: str, **options: Any) -> Any:
    # The model is held: parameters of an FSDP1 model that is gone may be parts.
    held = WRAPPERS[kind]()
    return make(name, held.groups, **options)


def clipped_later(name: str, is_loaded: bool) -> tuple[list[str], bool]:
    """What is said of two steps behind a `clip_norm` for parts by FSDP1, and whether nothing has changed by them.

    It is written into the group, or comes from a state dict.
    """
    held = WRAPPERS["fsdp1"]()
    optimizer = make(name, held.groups)
    held.model(torch.ones(12, 7)).sum().backward()
    optimizer.step()
    if is_loaded:
        saved = optimizer.state_dict()
        saved["param_groups"][0]["clip_norm"] = 1.0
        optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0]["clip_norm"] = 1.0
    before = [param.detach().clone() for param in held.model.parameters()]
    texts = [outcome(optimizer.step) for _ in range(2)]
    is_same = all(map(torch.equal, before, held.model.parameters()))
    optimizer.param_groups[0]["clip_norm"] = 0.0
    return [*texts, outcome(optimizer.step)], is_same


def averages_of_fsdp1(name: str) -> str:
    held = WRAPPERS["fsdp1 original parameters"]()
    optimizer = make(name, held.groups, ema_decay=0.5)
    held.model(torch.ones(12, 7)).sum().backward()
    optimizer.step()
    try:
        with optimizer.swap_ema():
            return "accepted"
    except (RuntimeError, ValueError) as error:
        return str(error)


def detected() -> dict[str, str | None]:
    """What `hidden_sharding` says of parameters under each wrapper."""
    found: dict[str, str | None] = {}
    for kind in WRAPPERS:
        held = WRAPPERS[kind]()
        found[kind] = hidden_sharding([param for group in held.groups for param in group["params"]])
    found["fsdp1 one layer"] = hidden_in_one_layer(use_orig_params=True)
    whole = ShardingStrategy.NO_SHARD
    found["fsdp1 one layer whole"] = hidden_in_one_layer(use_orig_params=True, sharding_strategy=whole)
    seen: list[str | None] = []

    def build(params: Any, **options: Any) -> Any:
        params = list(params)
        seen.append(hidden_sharding([param for group in params for param in group["params"]]))
        return torch.optim.AdamW(params, **options)

    ZeroRedundancyOptimizer(WRAPPERS["ddp"]().model.parameters(), build)
    (found["zero"],) = seen
    return found


def checked() -> dict[str, str]:
    """The outcome of `check_sharding` for each kind of norm, without and with a group."""
    found = {}
    for kind in ("ddp", *KINDS):
        held = WRAPPERS[kind]()
        for norm in ("max_grad_norm", "clip_norm"):
            clipped = [{**group, "clip_norm": float(norm == "clip_norm")} for group in held.groups]
            settings = Settings(max_grad_norm=float(norm == "max_grad_norm"))
            for suffix, process_group in (("", None), (" group", dist.group.WORLD)):
                given = settings._replace(process_group=process_group)
                found[f"{kind} {norm}{suffix}"] = outcome(partial(check_sharding, clipped, given))
    return found


def clipped_by_host_and_kernels(strided: bool) -> str:
    """What a step says to `clip_norm` where the host updates one parameter of two, or none."""
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 4), world_mesh(), [Shard(0)]))
    plain = nn.Parameter(torch.zeros(4, 2)[:, 0] if strided else torch.zeros(4))
    optimizer = AdamW([sharded, plain], clip_norm=1.0, backend="triton")
    for param in (sharded, plain):
        param.grad = torch.ones_like(param)
    text = outcome(optimizer.step)
    assert text == "accepted" or not (whole(sharded).any() or plain.any())
    return text


def made_of_gathered_parameters(name: str, are_all: bool, is_resharded: bool) -> tuple[str, bool]:
    """What a step says to an optimizer that is made behind a forward pass, and whether it updates the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    if not are_all:
        # These are freed behind the forward pass, those of the root are not.
        fully_shard(model[0], mesh=world_mesh())
    fully_shard(model, mesh=world_mesh())
    model(torch.ones(2, 6))
    if is_resharded:
        model.reshard()
    optimizer = make(name, model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    before = [whole(param).clone() for param in model.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), not all(map(torch.equal, before, map(whole, model.parameters())))
    return "accepted", not any(map(torch.equal, before, map(whole, model.parameters())))
