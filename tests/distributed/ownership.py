"""Scenarios: the modules that hold parameters are found, and asked or told what an optimizer needs."""

import gc
import weakref
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dragon.vm.torch.optim import AdamW
from dragon.vm.torch.optim._distributed.owners import Replicas, reshard

from .factories import make
from .wrappers import WRAPPERS, batch


def unreduced() -> None:
    """The last forward pass decides, wherever the question is asked."""
    model, other = (DistributedDataParallel(nn.Linear(7, 2)) for _ in range(2))
    params = list(model.parameters())
    replicas = Replicas(params)
    expected = {id(param): model.process_group for param in params} if dist.get_world_size() > 1 else {}
    for is_reduced in (True, False, True):
        for module in (model, other):
            module.require_backward_grad_sync = is_reduced if module is model else not is_reduced
            module(batch(0)).sum().backward()
            module.require_backward_grad_sync = True
        assert replicas.unreduced() == ({} if is_reduced else expected)
    with model.no_sync():
        model(batch(0)).sum().backward()
    assert replicas.unreduced() == expected
    assert replicas
    assert not Replicas(list(nn.Linear(2, 2).parameters()))
    gone = weakref.ref(model)
    del model, module
    gc.collect()
    assert gone() is None, "the optimizer would keep the model alive"
    assert replicas.unreduced() == {}


class _PartlyShared(nn.Module):
    """Of its two layers DDP reduces one."""

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self.own, self.shared = (nn.Linear(n_columns, 1, bias=False) for _ in range(2))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ["own.weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + self.shared(x)


def ignored(name: str, is_last_synchronized: bool) -> list[float]:
    """First moments of a weight that DDP ignores, and of one that it reduces, behind parts with gradients 1 and 2.

    The gradients are those of the first process. Each process has ten times the gradients of the one before.
    """
    model = _PartlyShared(1)
    wrapped = DistributedDataParallel(model)
    optimizer = make(name, wrapped.parameters())
    for part in (1.0, 2.0):
        with nullcontext() if part == 2 and is_last_synchronized else wrapped.no_sync():
            wrapped(torch.tensor([[part * 10 ** dist.get_rank()]])).sum().backward()
        optimizer.sum_grad()
    optimizer.step()
    return [float(optimizer.state[each.weight]["exp_avg"]) for each in (model.own, model.shared)]


def released_ignored() -> tuple[str, bool]:
    """What is said of releasing gradients of a weight that DDP reduces, and whether one that it ignores is."""
    model = _PartlyShared(7)
    wrapped = DistributedDataParallel(model)
    own = AdamW(model.own.parameters(), release_gradients=True)
    wrapped(batch(0)).sum().backward()
    own.step()
    is_released = all(param.grad is None and own.state[param] for param in model.own.parameters())
    shared = AdamW(model.shared.parameters(), release_gradients=True)
    try:
        wrapped(batch(0)).sum().backward()
    except RuntimeError as error:
        return str(error), is_released
    return f"{shared} accepted", is_released


def resharded() -> tuple[bool, bool]:
    """Whether a forward pass sees changed shards of the root, without and with a call of `reshard`."""
    wrapped = WRAPPERS["fsdp2"]()
    (group,) = wrapped.groups
    params = group["params"]
    x = batch(0)
    seen = []
    with torch.no_grad():
        for is_called in (False, True):
            before = wrapped.model(x).clone()
            for param in params[-2:]:  # of the root, which keeps them whole
                param._local_tensor.add_(0.5)
            if is_called:
                reshard(params)
            seen.append(not torch.equal(wrapped.model(x), before))
    return seen[0], seen[1]
