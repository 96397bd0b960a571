"""`sum_grad`: sums in float32 or wider, one operation a call, and never anybody else's memory."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import SGD, Adam

from .support import home

BACKENDS = ["native", "triton", "eager"]
SHAPES = [(3, 5), (1100,), (), (0,)]


def parameters(dtype, device):
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in SHAPES]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    history=st.lists(st.tuples(st.lists(st.booleans(), min_size=4, max_size=4), st.booleans()), max_size=5),
    seed=st.integers(0, 1000),
)
def test_a_step_uses_the_sum_and_what_came_after_it(backend, dtype, history, seed):
    params = parameters(dtype, home(backend))
    optimizer = SGD(params, lr=1.0, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    totals = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    magnitudes = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for present, summed in history:
        for param, total, magnitude, has_grad in zip(params, totals, magnitudes, present, strict=True):
            if has_grad:
                grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
                own = grad.clone().to(param.device)
                param.grad = own if param.grad is None else param.grad + own
                total += grad.double()
                magnitude += grad.double().abs()
        if summed:
            optimizer.sum_grad()
            assert all(param.grad is None for param in params)
    optimizer.step()
    for param, total, magnitude in zip(params, totals, magnitudes, strict=True):
        # Additions outside the sum round to the parameter's dtype, up to one for each backward pass.
        allowed = (len(history) + 2) * torch.finfo(dtype).eps * magnitude
        assert ((param.detach().cpu().double() + total).abs() <= allowed).all()
    assert not optimizer._sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_keep_what_half_precision_loses(dtype):
    param = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = Adam([param])
    for value in (256.0, *[0.25] * 8):
        param.grad = torch.full((4,), value, dtype=dtype)
        optimizer.sum_grad()
    assert optimizer._sums.totals[param].dtype == torch.float32
    assert (optimizer._sums.totals[param] == 258).all()


def test_memory_that_somebody_else_may_write_to_is_copied():
    bucket = torch.ones(8)
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = SGD([param], lr=1.0)
    param.grad = bucket.view(8)
    optimizer.sum_grad()
    bucket.fill_(5)
    param.grad = bucket.view(8)
    optimizer.sum_grad()
    optimizer.step()
    assert (param == -6).all()


def test_zero_grad_leaves_the_sum_alone_and_a_copy_takes_it_along():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=True)
    twin_param, twin = copy.deepcopy((param, optimizer))
    for each, its in ((param, optimizer), (twin_param, twin)):
        its.step()
        assert (each == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_uses_the_sum_up(backend):
    param = torch.nn.Parameter(torch.zeros(3, device=home(backend)))
    optimizer = SGD([param], lr=1.0, backend=backend, skip_nonfinite=True)
    param.grad = torch.tensor([1.0, float("inf"), 1.0]).to(param.device)
    optimizer.sum_grad()
    optimizer.step()
    assert (param == 0).all()
    assert optimizer.n_skipped_steps == 1
    param.grad = torch.ones_like(param)
    optimizer.sum_grad()
    optimizer.step()
    assert (param == -1).all()


def test_gradients_of_another_layout_are_summed_element_by_element():
    for backend in BACKENDS:
        where = torch.device(home(backend))
        param = torch.nn.Parameter(torch.zeros(4, 3, device=where))
        optimizer = SGD([param], lr=1.0, backend=backend)
        with where:
            grads = [torch.randn(4, 3), torch.randn(3, 4).t(), torch.randn(4, 6)[:, ::2]]
        expected = -sum(grads)
        for grad in grads:
            param.grad = grad
            optimizer.sum_grad()
        optimizer.step()
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-6)
