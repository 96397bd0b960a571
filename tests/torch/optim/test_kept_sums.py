"""Sums of gradients that are saved, and that a `GradScaler` has looked at without a step."""

import copy

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, home


def summed() -> tuple[torch.nn.Parameter, SGD]:
    """A parameter of zeros, and an optimizer with a sum of ones for it."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    return param, optimizer


@pytest.mark.parametrize("again", ["sum_grad", "zero_grad"])
def test_a_sum_that_was_looked_at_takes_no_later_gradient(again: str) -> None:
    param, optimizer = summed()
    assert optimizer._step_supports_amp_scaling
    getattr(optimizer, again)()
    param.grad = torch.full((3,), 5.0)
    optimizer.zero_grad()
    optimizer.step()
    assert param.tolist() == [-1.0] * 3


def test_a_loaded_sum_takes_the_place_of_one_that_was_looked_at() -> None:
    param, optimizer = summed()
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling
    optimizer.load_state_dict(saved)
    assert not optimizer.state, "a sum is no state"
    optimizer.step()
    assert param.tolist() == [-1.0] * 3


def test_a_gradient_of_another_shape_than_its_parameter_is_not_summed() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    param.data = torch.zeros(4)
    with pytest.raises(ValueError, match=r"a gradient has shape \(3,\), but its parameter \(4,\)"):
        optimizer.sum_grad()
    assert param.grad is not None
    assert not optimizer._sums


def test_a_dict_with_a_sum_is_loaded_twice() -> None:
    saved = summed()[1].state_dict()
    for _ in range(2):
        param, optimizer = summed()
        optimizer.step()
        optimizer.load_state_dict(saved)
        optimizer.step()
        assert param.tolist() == [-2.0] * 3


@pytest.mark.parametrize("n_params", [0, 2])
def test_a_sum_for_other_groups_is_refused_in_the_words_of_pytorch(n_params: int) -> None:
    saved = summed()[1].state_dict()
    optimizer = SGD([{"params": [torch.nn.Parameter(torch.zeros(4)) for _ in range(n_params)]}])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(saved)


def test_a_sum_is_saved_beside_a_state_and_ends_with_the_next_step() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([param])
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
        param.grad = torch.ones(3)
        optimizer.sum_grad()
        saved = optimizer.state_dict()
        assert saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq", "grad_sum"}
        optimizer.load_state_dict(saved)
        optimizer.step()
        assert optimizer.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert float(optimizer.state[param]["step"]) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_beside_sums_is_unscaled_once(backend: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, backend=backend)
    params[0].grad = torch.full_like(params[0], 4.0)
    optimizer.sum_grad()
    params[1].grad = torch.full_like(params[1], 8.0)
    optimizer.grad_scale = torch.tensor(4.0, device=home(backend))
    optimizer.found_inf = torch.tensor(0.0, device=home(backend))
    optimizer.step()
    assert [param.tolist() for param in params] == [[-1.0] * 3, [-2.0] * 3]
    assert params[1].grad.tolist() == [2.0] * 3


def test_a_hook_after_loading_finds_the_loaded_sum_even_if_it_fails() -> None:
    param, optimizer = summed()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    found = []

    def fail(loaded: SGD) -> None:
        found.append(loaded.state_dict()["state"][0]["grad_sum"].tolist())
        raise OSError("no space left")

    optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(OSError, match="no space left"):
        optimizer.load_state_dict(saved)
    assert found == [[1.0] * 3]
    optimizer.step()
    assert param.tolist() == [-2.0] * 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_gradient_of_another_kind_of_number_is_not_summed(is_first: bool, dtype: torch.dtype) -> None:
    param, optimizer = summed()
    if is_first:
        optimizer.step()
    before = param.tolist()
    param.grad_dtype = None  # type: ignore[attr-defined]  # the stubs lack it
    param.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=f"a parameter is of torch.float32, but its gradient is of {dtype}"):
        optimizer.sum_grad()
    param.grad = None
    optimizer.step()
    assert param.tolist() == (before if is_first else [-1.0] * 3)
