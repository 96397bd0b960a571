"""Autograd is told what a step writes to: a graph from before it must not be used with values from after it."""

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, home

CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_a_graph_from_before_a_step_is_refused_after_it(algorithm, backend, flatten):
    weight = torch.nn.Parameter(torch.ones(3, device=home(backend)))
    optimizer = algorithm([weight], lr=0.1, backend=backend, flatten=flatten)
    for _ in range(3):
        loss = (weight**2).sum()
        loss.backward(retain_graph=True)
        before = weight._version
        optimizer.step()
        assert weight._version > before
        with pytest.raises(RuntimeError, match=CHANGED):
            loss.backward()
        optimizer.zero_grad()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_a_gradient_are_not_written_to(backend):
    params = [torch.nn.Parameter(torch.ones(3, device=home(backend))) for _ in range(2)]
    optimizer = Adam(params, backend=backend)
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert params[0]._version > 0
    assert params[1]._version == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_zeroed_by_a_step_are_detached_and_marked_as_written(backend):
    weight = torch.nn.Parameter(torch.ones(3, device=home(backend)))
    optimizer = SGD([weight], lr=0.1, backend=backend)
    (gradient,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    weight.grad = gradient
    penalty = (gradient**2).sum()
    before = gradient._version
    optimizer.step(zero_grad=True)
    assert gradient._version > before
    assert not weight.grad.any()
    assert weight.grad.grad_fn is None
    with pytest.raises(RuntimeError, match="detached in-place"):
        penalty.backward()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_step_that_the_host_skips_writes_to_nothing(backend):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([weight], lr=0.1, backend=backend, skip_nonfinite=True)
    loss = (weight**2).sum()
    weight.grad = torch.full((3,), torch.inf)
    optimizer.step()
    weight.grad = None
    loss.backward()
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.fixture
def always_warning():
    """PyTorch gives some warnings once only."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("factors", [[1.0, 1.0], [1.0, 2.0]], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_gradients_that_autograd_sees_are_checked_without_a_warning(norm_type, factors, always_warning):
    params = [torch.ones(3, requires_grad=True).clone() for _ in range(2)]
    groups = [{"params": [param], "grad_scale": factor} for param, factor in zip(params, factors, strict=True)]
    optimizer = SGD(groups, lr=0.1, differentiable=True, skip_nonfinite=True, norm_type=norm_type)
    rate = torch.tensor(2.0, requires_grad=True)
    for param in params:
        param.grad = rate * torch.ones(3)
    optimizer.step()
    (found,) = torch.autograd.grad(sum(param.sum() for param in params), rate)
    assert found.item() == pytest.approx(-0.1 * 3 * sum(factors))


def test_betas_that_autograd_sees_are_read_without_a_warning(always_warning):
    betas = [torch.tensor(beta, requires_grad=True) for beta in (0.9, 0.99)]
    weight = torch.ones(3, requires_grad=True).clone()
    optimizer = Adam([weight], betas=tuple(betas), differentiable=True, state_dtype=torch.float32)
    weight.grad = torch.arange(3.0)
    for _ in range(2):
        optimizer.step()
    assert all(torch.autograd.grad(optimizer.state[weight]["exp_avg_sq"].sum(), betas[1]))
