"""Measure the backends in units of the operand's eps: `python -m tests.torch.optim.measure` from the repository.

The same random steps as `python -m dragon.vm.testing.measure`, which measures PyTorch's Adam.
"""

import argparse
import os
import random
from collections import defaultdict

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from dragon.vm.testing import adam_errors
from dragon.vm.testing.measure import _excess, _random_step
from dragon.vm.testing.records import AdamState
from dragon.vm.torch.optim import Adam

from .support import BACKENDS, home

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")


def step_of(backend, start, grad, options):
    """The state after one step of a backend from `start`."""
    device = home(backend)
    param = torch.nn.Parameter(start.param.to(device, copy=True))
    arguments = {name: getattr(options, name) for name in OPTIONS}
    optimizer = Adam([param], backend=backend, epsilon_hat=False, **arguments)
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options.amsgrad else ()))
    optimizer.state[param] = {"step": torch.tensor(start.step)}
    optimizer.state[param] |= {name: getattr(start, name).to(device, copy=True) for name in names}
    param.grad = grad.to(device)
    optimizer.step()
    state = {name: value.cpu() for name, value in optimizer.state[param].items()}
    return AdamState(
        param.detach().cpu(), float(state["step"]), *(state.get(name) for name in AdamState._fields[2:])
    )


def main():
    """Print the largest errors, and by how much an element is worse than torch's fused operation."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torch.optim.measure",
        description="Errors of Dragon's Adam in units of the operand's eps.",
    )
    parser.add_argument("--steps", type=int, default=300, help="random steps for each dtype")
    n_steps = parser.parse_args().steps
    print(f"torch {torch.__version__}, {n_steps} steps of 64 elements for each dtype")
    print(f"{'dtype':9} {'backend':8} {'field':15} {'error':>7} {'over fused':>11}")
    rng = random.Random(0)
    for dtype in DTYPES:
        worst = defaultdict(lambda: (0.0, 0.0))
        for _ in range(n_steps):
            start, grad, options = _random_step(rng, dtype, 64)
            for backend in BACKENDS:
                for errors in adam_errors(start, grad, step_of(backend, start, grad, options), options):
                    error, excess = worst[backend, errors.field]
                    worst[backend, errors.field] = max(error, errors.worst()), max(excess, _excess(errors))
        for (backend, field), (error, excess) in worst.items():
            print(f"{str(dtype).removeprefix('torch.'):9} {backend:8} {field:15} {error:7.3g} {excess:11.3g}")


if __name__ == "__main__":
    main()
