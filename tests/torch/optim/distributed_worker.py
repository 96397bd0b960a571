"""Trains one model on two gloo processes with torch's Adam and with ours; run by test_distributed.py.

Prints one JSON line from rank 0: how far the trained parameters are apart, and what the states are.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dragon.vm.torch.optim import Adam


def wrapped(kind):
    torch.manual_seed(0)
    # The last layer has fewer rows than there are processes times two, so that shards are uneven.
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    if kind == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(kind, rank, make_optimizer, sums=False, reload=False):
    model = wrapped(kind)
    optimizer = make_optimizer(model.parameters())
    for step in range(4):
        for half in range(2):
            generator = torch.Generator().manual_seed(10 * step + half + 100 * rank)
            model(torch.randn(4, 7, generator=generator)).square().sum().backward()
            if sums:
                optimizer.sum_grad()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        if reload and step == 1:
            saved = get_optimizer_state_dict(model, optimizer)
            optimizer = make_optimizer(model.parameters())
            set_optimizer_state_dict(model, optimizer, saved)
    return [whole(param) for param in model.parameters()], optimizer


def main():
    kind, backend = sys.argv[1:3]
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected, _ = train(kind, rank, lambda params: torch.optim.Adam(params, lr=0.05))
    report = {}
    for name, options in {"plain": {}, "sums": {"sums": True}, "reload": {"reload": True}}.items():
        found, optimizer = train(
            kind, rank, lambda params: Adam(params, lr=0.05, epsilon_hat=False, backend=backend), **options
        )
        report[name] = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    report["state"] = type(next(iter(optimizer.state.values()))["exp_avg"]).__name__
    try:
        train(kind, rank, lambda params: Adam(params, backend=backend, max_grad_norm=1.0))
    except ValueError as error:
        report["max_grad_norm"] = str(error)
    if rank == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
