"""Scenarios: the modules that hold parameters are found, and asked or told what an optimizer needs."""

import gc
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dragon.vm.torch.optim._distributed.owners import Replicas, reshard

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
