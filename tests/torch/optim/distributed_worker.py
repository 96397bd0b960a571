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


def same_state(alone, distributed):
    return alone.keys() == distributed.keys() and all(torch.equal(alone[k], whole(distributed[k])) for k in alone)


def unsharded(state_dict):
    """A state dict with whole tensors, as a single process saves it."""
    state = {
        index: {name: whole(value) for name, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def train(kind, rank, make_optimizer, sums=False, reload=None):
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
            saved = get_optimizer_state_dict(model, optimizer) if reload == "sharded" else optimizer.state_dict()
            optimizer = make_optimizer(model.parameters())
            if reload == "sharded":
                set_optimizer_state_dict(model, optimizer, saved)
            else:
                optimizer.load_state_dict(unsharded(saved))
                alone = make_optimizer([torch.nn.Parameter(whole(param)) for param in model.parameters()])
                alone.load_state_dict(saved)
                assert all(map(same_state, alone.state.values(), optimizer.state.values()))
    return [whole(param) for param in model.parameters()], optimizer


def main():
    kind, backend = sys.argv[1:3]
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected, _ = train(kind, rank, lambda params: torch.optim.Adam(params, lr=0.05))
    report = {}
    runs = {"plain": {}, "sums": {"sums": True}, "sharded": {"reload": "sharded"}, "whole": {"reload": "whole"}}
    for name, options in runs.items():
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
    # Whoever leaves first takes the store along.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
