"""What limits an optimizer: the operation without any host work, and the least that a host must read."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import BETAS, Workload

# Below this many elements one thread is faster, as for the native backend.
SINGLE_THREAD_NUMEL = 8192

Step = Callable[[], object]


def operation(workload: Workload) -> Step:
    """Torch's fused operation and its counters on lists made once, a call for each group: no host work at all."""
    calls = [_call(group["params"], [p.grad for p in group["params"]], group["lr"]) for group in workload.groups]
    return _on_threads([param.numel() for param in workload.params], calls, workload)


def flat_operation(workload: Workload) -> Step:
    """The same on parameters, gradients and moments that lie flat, so that a group is one tensor."""
    calls = []
    for group in workload.groups:
        params = group["params"]
        sizes = [param.numel() for param in params]
        flat = torch.cat([param.detach().reshape(-1) for param in params])
        flat_grad = torch.cat([param.grad.reshape(-1) for param in params])
        for param, values, grad in zip(params, flat.split(sizes), flat_grad.split(sizes), strict=True):
            param.data, param.grad = values.view(param.shape), grad.view(param.shape)
        calls.append(_call([flat], [flat_grad], group["lr"]))
    return _on_threads([sum(param.numel() for param in workload.params)], calls, workload)


def _call(params: list[Tensor], grads: list[Tensor], lr: float) -> Callable[[float], None]:
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(param) for param in params] for _ in range(2))
    counters = torch.zeros(len(params), device=params[0].device)
    steps = list(counters.unbind())

    def call(eps: float) -> None:
        counters.add_(1)
        torch._fused_adam_(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=BETAS[0], beta2=BETAS[1],
            weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    return call


def _on_threads(numels: list[int], calls: list[Callable[[float], None]], workload: Workload) -> Step:
    alone = workload.origin.device.type == "cpu" and max(numels) < SINGLE_THREAD_NUMEL

    @torch.no_grad()
    def step() -> None:
        n_threads = torch.get_num_threads()
        if alone:
            torch.set_num_threads(1)
        for call in calls:
            call(workload.origin.eps)
        torch.set_num_threads(n_threads)

    return step


def addresses(workload: Workload) -> Step:
    """Read each gradient, and the addresses of each parameter, gradient, counter and moment: nothing else."""
    states = [torch.zeros_like(param) for param in workload.params for _ in range(3)]
    params: list[Any] = workload.params

    def step() -> list[list[int]]:
        grads = list(map(attrgetter("grad"), params))
        return [list(map(Tensor.data_ptr, tensors)) for tensors in (params, grads, states)]

    return step
