"""A learning rate that changes between steps is the one of the next step, in every backend."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, bits, home, numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Adam, SGD])
@pytest.mark.parametrize("numel", [5, 9000])
def test_a_step_after_a_change_has_the_new_rate(numel: int, kind: type, backend: str) -> None:
    where = home(backend)
    params = [torch.nn.Parameter(numbers(i, numel, device=where)) for i in range(3)]
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
                param.grad = numbers(10 * step + i, numel, device=where)
            other.step()
        assert list(map(bits, params)) == list(map(bits, twins))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_may_change_its_type(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(3, device=home(backend)))
    optimizer = SGD([param], lr=torch.tensor(0.5), backend=backend)
    rates = [
        torch.tensor(0.5),
        0.25,
        torch.tensor(0.5),
        0.5,
        np.float64(0.5),
        0.25,
        np.float64(0.5),
        np.array(0.5),
    ]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        before, param.grad = param.detach().clone(), torch.ones_like(param)
        optimizer.step()
        assert torch.equal(param, before - float(rate))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", [torch.Tensor.clone, float])
def test_a_rate_that_was_replaced_by_an_equal_one_is_read_no_more(backend: str, other: Any) -> None:
    param, rate = torch.nn.Parameter(torch.zeros(3, device=home(backend))), torch.tensor(0.5)
    optimizer = SGD([param], lr=rate, backend=backend)
    for step in range(3):
        if step == 1:
            optimizer.param_groups[0]["lr"] = other(rate)
        if step == 2:
            rate.fill_(10.0)
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.equal(param, torch.full_like(param, -1.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_comes_back_with_another_option_is_the_one_of_the_step(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(3, device=home(backend)))
    optimizer = SGD([param], lr=0.5, backend=backend)
    for rate, foreach in ((0.5, None), (0.25, None), (0.5, False)):
        optimizer.param_groups[0].update(lr=rate, foreach=foreach)
        before, param.grad = param.detach().clone(), torch.ones_like(param)
        optimizer.step()
        assert torch.equal(param, before - rate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [torch.tensor, np.array])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_betas_of_one_array_may_change_in_place(dtype: torch.dtype | None, make: Any, backend: str) -> None:
    runs = []
    for changing in (make([0.9, 0.99]), None):
        param = torch.nn.Parameter(torch.zeros(3, device=home(backend)))
        optimizer = Adam([param], backend=backend, state_dtype=dtype)
        for size in (1.0, 2.0, 3.0):
            if changing is None:
                optimizer.param_groups[0]["betas"] = (0.5 / size, 0.99)
            else:
                changing[0] = 0.5 / size
                if size == 1:
                    optimizer.param_groups[0]["betas"] = changing
            param.grad = torch.full_like(param, size)
            optimizer.step()
        runs.append(param.detach())
    torch.testing.assert_close(*runs)
