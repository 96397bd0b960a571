"""Steps of several processes beside those of one, on a GPU each where there are some.

torchrun --nproc-per-node 2 -m tests.distributed.many_gpus
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dragon.vm.torch.optim import Adam

N_STEPS = 4
# Reduced gradients and norms have other last bits than those of one process.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def here() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).to(here())


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(here())


def make_optimizer(params) -> Adam:
    return Adam(params, lr=0.05, max_grad_norm=0.1, weight_decay=0.01)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_as_alone(kind: str) -> None:
    """A wrapped model, whose processes take the same batches, is what one process makes of it."""
    alone = make_model()
    model = copy.deepcopy(alone)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp2":
        fully_shard(model)
    mesh = init_device_mesh(here().type, (dist.get_world_size(),))
    params = list(model.parameters())
    if kind == "dtensor":
        params = [nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])) for param in params]
    reference, optimizer = make_optimizer(alone.parameters()), make_optimizer(params)
    for step in range(N_STEPS):
        for each in (reference, optimizer):
            each.zero_grad()
        alone(batch(step)).square().mean().backward()
        if kind == "dtensor":
            for param, other in zip(params, alone.parameters(), strict=True):
                param.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
        else:
            model(batch(step)).square().mean().backward()
        reference.step()
        optimizer.step()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, **TOLERANCE)
        for param, other in zip(params, alone.parameters(), strict=True):
            torch.testing.assert_close(whole(param.detach()), other.detach(), **TOLERANCE)


def meets_on_the_gpu() -> None:
    """Parameters on CPU and GPU have one norm, also where a process has gradients of the former alone."""
    params = [nn.Parameter(torch.ones(3, device=device)) for device in (torch.device("cpu"), here())]
    optimizer = Adam(params, lr=0.1, max_grad_norm=1.0, process_group=dist.group.WORLD)
    rank, n_processes = dist.get_rank(), dist.get_world_size()
    for step, n_grads in enumerate((2 * n_processes, 2 * n_processes - 1)):
        for param in params:
            param.grad = torch.full_like(param, 2.0)
        if step == 1 and rank == 0:
            params[1].grad = None
        optimizer.step()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(float(optimizer.grad_norm), (n_grads * 3 * 4.0) ** 0.5)


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    for kind in ("ddp", "fsdp2", "dtensor"):
        trained_as_alone(kind)
        print(f"rank {dist.get_rank()} on {here()}: {kind} as alone", flush=True)
    meets_on_the_gpu()
    print(f"rank {dist.get_rank()} on {here()}: sums meet on {here().type}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
