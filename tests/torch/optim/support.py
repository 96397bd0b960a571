"""Optimizers, parameters and situations that the optimizer's tests share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from dragon.kernels import launch
from dragon.vm.torch.optim import SGD, Adam

BACKENDS = ("triton", "native", "eager")

# Drawing some tensors takes a while on a busy machine, and so does interpreting a kernel.
patient = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def home(backend: str) -> str:
    """The device on which a backend is tested: a GPU only for kernels that are compiled."""
    if backend != "triton" or launch.INTERPRETED:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "xpu"


@contextmanager
def no_waits() -> Iterator[None]:
    """Within this block, an operation for which the host waits for a CUDA device raises RuntimeError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def maker(
    algorithm: Callable[..., torch.optim.Optimizer], backend: str | None, **fixed: Any
) -> Callable[..., Any]:
    """A constructor of an optimizer on one backend."""
    return lambda groups, **options: algorithm(groups, backend=backend, **fixed, **options)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers that depend on the seed and the shape only."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(device, dtype)


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """A parameter of each shape, with numbers of its own."""
    return [torch.nn.Parameter(numbers(i, *shape, dtype=dtype, device=device)) for i, shape in enumerate(shapes)]


def give_gradients(params: Sequence[Tensor], seed: int) -> None:
    """Give each parameter a new gradient, which depends on the seed and its position."""
    for i, param in enumerate(params):
        grad = numbers(1000 * (seed + 1) + i, *param.shape, dtype=param.dtype, device=str(param.device))
        param.grad = torch.empty_like(param).copy_(grad)


def bits(tensor: Tensor) -> bytes:
    """The elements in the order of the indices, as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def everything(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Bits of all parameters and states of an optimizer in order, with the names of the states."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(bits(param), _state_bits(optimizer, param)) for param in params]


def _state_bits(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
    state = optimizer.state.get(param, {})
    return {key: bits(value) if isinstance(value, Tensor) else value for key, value in sorted(state.items())}


def twin(optimizer: Adam | SGD) -> Adam | SGD:
    """A fresh optimizer in the same situation: copies of all tensors and groups, and no plans."""
    copies = {}
    groups = []
    for group in optimizer.param_groups:
        own = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        own["params"] = []
        for param in group["params"]:
            same = torch.nn.Parameter(like(param))
            same.grad_dtype = None
            same.grad = None if param.grad is None else like(param.grad)
            copies[param] = same
            own["params"].append(same)
        groups.append(own)
    fresh = type(optimizer)(groups, **optimizer.defaults)
    for param, state in optimizer.state.items():
        if param in copies:
            fresh.state[copies[param]] = {
                key: like(value) if isinstance(value, Tensor) else value for key, value in state.items()
            }
    return fresh


def like(tensor: Tensor) -> Tensor:
    """A copy in memory of its own with the same strides."""
    return copy.deepcopy(tensor.detach())


def give(param: Tensor, index: int, number: int) -> None:
    """Give a parameter a gradient of its own for this step."""
    param.grad = numbers(10 * number + index, *param.shape, device=str(param.device))


def give_some(params: Sequence[Tensor], present: Sequence[Any], number: int) -> None:
    """Give those that are present a gradient, and the others none."""
    for i, param in enumerate(params):
        param.grad = None
        if present[i]:
            give(param, i, number)


def take_steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], patterns: Iterable[int]) -> None:
    """A step for each pattern, whose bits say which parameters have a gradient."""
    for pattern in patterns:
        give_some(params, [pattern >> i & 1 for i in range(len(params))], pattern)
        optimizer.step()
