"""The memory modes, and small models that are trained in them with gradients that depend on a seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim import AdamW

BF16, FP32 = torch.bfloat16, torch.float32

# By name, the dtype of the parameters and the options.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16 states": (FP32, {"state_dtype": BF16}),
    "bf16 states to nearest": (FP32, {"state_dtype": BF16, "stochastic_rounding": False}),
    "one bf16 state": (FP32, {"state_dtype": {"exp_avg": BF16, "exp_avg_sq": FP32}}),
    "8bit": (FP32, {"state_dtype": "8bit"}),
    "8bit to nearest": (FP32, {"state_dtype": "8bit", "stochastic_rounding": False}),
    "bf16 stochastic": (BF16, {"stochastic_rounding": True, "state_dtype": FP32}),
    "bf16 stochastic, bf16 states": (BF16, {"stochastic_rounding": True, "state_dtype": BF16}),
    "bf16 stochastic, 8bit": (BF16, {"stochastic_rounding": True, "state_dtype": "8bit"}),
    "split16": (BF16, {"master_weights": "split16"}),
    "split16, bf16 states": (BF16, {"master_weights": "split16", "state_dtype": BF16}),
    "split8, 8bit": (BF16, {"master_weights": "split8", "state_dtype": "8bit"}),
    "split8, 8bit to nearest": (
        BF16,
        {"master_weights": "split8", "state_dtype": "8bit", "stochastic_rounding": False},
    ),
    "fp32 masters, 8bit": (BF16, {"master_weights": FP32, "state_dtype": "8bit"}),
    "fp32 masters of fp16": (torch.float16, {"master_weights": FP32}),
    "bf16 states, amsgrad, average": (FP32, {"state_dtype": BF16, "amsgrad": True, "ema_decay": 0.9}),
    "split8, 8bit, amsgrad, average": (
        BF16,
        {"master_weights": "split8", "state_dtype": "8bit", "amsgrad": True, "ema_decay": 0.9},
    ),
}
# All of these warn, and are meant to.
TO_NEAREST = [name for name in MODES if "nearest" in name]

# All are stored in 8 bits where that is asked for.
SHAPES = ((64, 64), (80, 192), (4, 16, 64))


def make(
    mode: str, shapes: Sequence[tuple[int, ...]] = SHAPES, backend: str | None = "eager", **options: Any
) -> tuple[list[Tensor], AdamW]:
    """Parameters and their optimizer."""
    dtype, own = MODES[mode]
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return params, AdamW(params, **{"lr": 1e-2, "backend": backend, **own, **options})


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    """Gradients of very different sizes, some of them 0."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        size = 10.0 ** torch.randint(-6, 3, (1,), generator=generator).item()
        value = torch.randn(param.shape, generator=generator) * size
        kept = torch.rand(param.shape, generator=generator) < 0.9
        param.grad = (value * kept).to(param.dtype)


def train(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Take steps; the gradients are those of step `first` and on."""
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def bits(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> list[bytes]:
    """The bytes of all parameters and of all that the optimizer keeps."""
    found = []
    for param in params:
        found.append(param.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in sorted(optimizer.state[param].items()):
            if isinstance(value, Tensor):
                found.append(name.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.append(f"{name} {value}".encode())
    return found
