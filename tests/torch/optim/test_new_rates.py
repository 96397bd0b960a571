"""A learning rate that changes between steps is the one of the next step, in every backend."""

import copy

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, bits, home, numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_step_after_a_change_has_the_new_rate(kind: type, backend: str) -> None:
    where = home(backend)
    params = [torch.nn.Parameter(numbers(i, 5, device=where)) for i in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = kind(groups, lr=0.1, backend=backend)
    # Groups of one rate share calls: while it changes for both, and no longer once they part.
    rates_of = [(0.1, 0.1), (0.5, 0.5), (0.2, 0.5), (0.2, 0.25), (0.25, 0.25), (0.0, 0.125)]
    for step, rates in enumerate(rates_of):
        # A copy reads all hyperparameters anew.
        twins, twin = copy.deepcopy((params, optimizer))
        for own, other in ((params, optimizer), (twins, twin)):
            for group, rate in zip(other.param_groups, rates, strict=True):
                group["lr"] = rate
            for i, param in enumerate(own):
                param.grad = numbers(10 * step + i, 5, device=where)
            other.step()
        assert list(map(bits, params)) == list(map(bits, twins))
