"""Measure torch's own Adam in units of the operand's eps: `python -m dragon.vm.testing.measure`.

The slack in `dragon.vm.testing.budget` is held against this table.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .judge import FieldErrors, adam_errors
from .records import AdamOptions, AdamState, converted
from .snapshots import adam_snapshot

ARGUMENTS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


def _random_step(rng: random.Random, dtype: torch.dtype, numel: int) -> tuple[AdamState, Tensor, AdamOptions]:
    """Draw a start (moments of the gradient's size within 2**8), a gradient and hyperparameters."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(binade: int) -> Tensor:
        return (torch.randn(numel, generator=generator, dtype=torch.float64) * 2.0**binade).to(dtype)

    binade = rng.randrange(-20, 4)
    options = AdamOptions(
        lr=rng.choice([1e-4, 1e-3, 0.1, 1.0]),
        betas=(rng.choice([0.0, 0.5, 0.9, 0.95]), rng.choice([0.9, 0.95, 0.99, 0.999, 0.9999])),
        eps=rng.choice([1e-8, 1e-15, 1e-3]),
        weight_decay=rng.choice([0.0, 0.01, 1.0]),
        amsgrad=rng.random() < 0.5,
        maximize=rng.random() < 0.5,
        decoupled_weight_decay=rng.random() < 0.5,
    )
    second = normal(binade + rng.randrange(-8, 9)).square()
    start = AdamState(
        normal(rng.randrange(-8, 3)),
        float(rng.choice([0, 1, 2, 10, 1000, 100_000])),
        normal(binade + rng.randrange(-8, 9)),
        second,
        second * 1.5 if options.amsgrad else None,
    )
    return start, normal(binade), options


def _torch_step(start: AdamState, grad: Tensor, options: AdamOptions, name: str) -> AdamState:
    """Let torch.optim.Adam take one step from a start, by the named implementation."""
    state: dict[str, Any] = converted(start, Tensor.clone)._asdict()
    state = {name: value for name, value in state.items() if value is not None}
    param = torch.nn.Parameter(state.pop("param"))
    arguments = {name: getattr(options, name) for name in ARGUMENTS}
    optimizer = torch.optim.Adam([param], **arguments, **IMPLEMENTATIONS[name])
    optimizer.state[param] = {**state, "step": torch.tensor(start.step)}
    param.grad = grad.clone()
    optimizer.step()
    return adam_snapshot(param, optimizer.state[param], options, grad.dtype)


def _excess(errors: FieldErrors) -> float:
    """Return by how many units the worst element is worse than the same element of the fused step."""
    return float(np.max(errors.error - errors.fused_error, initial=0.0))


def measure(steps: int, numel: int = 64, seed: int = 0) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Measure torch's three implementations on random steps.

    Args:
        steps: Number of steps for each dtype.
        numel: Elements of each parameter.
        seed: Seed of everything that is drawn.

    Returns:
        (dtype, implementation, field) -> (largest error, largest elementwise excess over fused), in units.
    """
    rng = random.Random(seed)
    worst: dict[tuple[str, str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for _ in range(steps):
            start, grad, options = _random_step(rng, dtype, numel)
            for name in IMPLEMENTATIONS:
                # torch rounds every intermediate result to 16 bits, except in the fused operation.
                compute_dtype = None if name == "fused" else dtype
                after = _torch_step(start, grad, options, name)
                for errors in adam_errors(start, grad, after, options, compute_dtype):
                    key = (str(dtype).removeprefix("torch."), name, errors.field)
                    error, excess = worst[key]
                    worst[key] = (max(error, errors.worst()), max(excess, _excess(errors)))
    return dict(worst)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m dragon.vm.testing.measure",
        description="Errors of torch.optim.Adam in units of the operand's eps.",
    )
    parser.add_argument("--steps", type=int, default=3000, help="random steps for each dtype")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps: expected at least 1, got {steps}")
    print(f"torch {torch.__version__}, {steps} steps of 64 elements for each dtype")
    print(f"{'dtype':9} {'torch.optim.Adam':17} {'field':15} {'error':>9} {'over fused':>11}")
    for (dtype, name, field), (error, excess) in measure(steps).items():
        print(f"{dtype:9} {name:17} {field:15} {error:9.3g} {excess:11.3g}")


if __name__ == "__main__":
    main()
