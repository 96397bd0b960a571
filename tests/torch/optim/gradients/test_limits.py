"""Bounds at the ends of the range: infinite ones, those beyond a dtype, and gradients that a scale made tiny."""

import math

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from ..support import BACKENDS, bits, give_gradients, home, numbers, parameters

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("name", ["clip_norm", "clip_value", "max_grad_norm"])
def test_an_infinite_bound_bounds_nothing(backend, name):
    runs = [parameters([(3,), ()], device=home(backend)) for _ in range(2)]
    for params, options in zip(runs, ({}, {name: math.inf}), strict=True):
        optimizer = SGD(params, lr=0.5, backend=backend, **options)
        for size in (1.0, 0.0, 1e30):
            for param in params:
                param.grad = torch.full_like(param, size)
            optimizer.step()
    assert list(map(bits, runs[0])) == list(map(bits, runs[1]))


@each_backend
@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_an_infinite_norm_does_what_pytorchs_clipping_does(backend, bound):
    ours, theirs = (parameters([(2,), (2,)], device=home(backend)) for _ in range(2))
    for params in (ours, theirs):
        params[0].grad, params[1].grad = (
            torch.tensor(value, device=home(backend)) for value in ([math.inf, 1], [2.0, 3])
        )
    SGD(ours, lr=0.5, backend=backend, max_grad_norm=bound).step()
    torch.nn.utils.clip_grad_norm_(theirs, bound)
    torch.optim.SGD(theirs, lr=0.5).step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True, rtol=0, atol=0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bound", [1e-9, 1.0, 1e5, 1e39])
def test_a_bound_costs_no_gradient_that_a_scale_made_tiny(backend, dtype, bound):
    """Under a loss scale a true gradient of 2e-8 is held, and one of the dtype's largest numbers too."""
    scale, largest = 65536.0, min(torch.finfo(dtype).max, 1e15)
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=home(backend)))
    optimizer = Adam([param], lr=0.1, eps=1e-12, clip_value=bound, backend=backend)
    param.grad = torch.tensor([2e-8 * scale, -largest, 0.0], dtype=dtype, device=home(backend))
    optimizer.grad_scale = torch.full((1,), scale, device=home(backend))
    optimizer.found_inf = torch.zeros(1, device=home(backend))
    optimizer.step()
    expected = torch.tensor([0.9, 1.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(param.detach().double().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    kept = optimizer.state[param]["exp_avg"].double().cpu() / 0.1
    # In float16 nothing is left of a moment of 1e-10.
    floor = 1e-7 if dtype == torch.float16 else 0
    assert kept[1] == pytest.approx(-min(bound, largest / scale), rel=4 * torch.finfo(dtype).eps, abs=floor)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finite_bound_makes_an_infinite_gradient_finite(backend, dtype):
    """Also a bound beyond fp32, which fp32 parameters take for the largest number that they hold."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype, device=home(backend)))
    param.grad = torch.tensor([math.inf, -math.inf, 1.0], dtype=dtype, device=home(backend))
    SGD([param], lr=0.5, clip_value=1e39, backend=backend).step()
    largest = min(1e39, torch.finfo(dtype).max)
    assert param.tolist() == [-0.5 * largest, 0.5 * largest, -0.5]


def test_a_bound_of_each_norm_is_of_its_l2_norm():
    with pytest.raises(ValueError, match=r"clip_norm bounds L2 norms: got clip_norm=1.0 and norm_type=inf"):
        Adam(parameters([(2,)]), clip_norm=1.0, norm_type=math.inf)


@each_backend
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True, "norm_type": math.inf}])
def test_a_step_without_gradients_has_a_norm_of_zero(backend, options):
    (param,) = parameters([(3,)], device=home(backend))
    optimizer = SGD([param], lr=0.5, backend=backend, **options)
    norms = []
    for grad, is_inference in ((None, True), (None, False), (torch.ones_like(param), False), (None, False)):
        param.grad = grad
        with torch.inference_mode(is_inference):
            optimizer.step()
        norms.append(optimizer.grad_norm)
    assert norms[0].dtype == torch.float64
    assert [bool(norm > 0) for norm in norms] == [False, False, True, False]


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_factor_without_an_inverse_in_fp32_is_multiplied_by(backend):
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.full((1,), 2e38)
    SGD([param], lr=1.0, grad_scale=1e-39, backend=backend).step()
    assert param.item() == pytest.approx(-0.2, rel=1e-5)


@each_backend
@pytest.mark.parametrize("numel", [4, 9000])
def test_a_scale_of_zero_makes_infinities_which_a_bound_cuts(backend, numel):
    param = torch.nn.Parameter(torch.zeros(numel, device=home(backend)))
    param.grad = torch.tensor([2.0, -1e-30], device=home(backend)).repeat(numel // 2)
    optimizer = SGD([param], lr=1.0, clip_value=0.5, backend=backend)
    optimizer.grad_scale = torch.zeros((), device=home(backend))
    optimizer.step()
    assert param.tolist() == [-0.5, 0.5] * (numel // 2)


@each_backend
@pytest.mark.parametrize("size", [10.0, 1e60])
def test_a_norm_that_the_host_decides_clips_float64_as_exactly_as_others(backend, size):
    base = numbers(3, 6, 2, dtype=torch.float64, device=home(backend))
    first = numbers(2, 9, dtype=torch.float64, device=home(backend))
    params = [torch.nn.Parameter(first), torch.nn.Parameter(base[:, 0])]
    before, sizes = [param.detach().clone() for param in params], (1.0, size)
    for i, param in enumerate(params):
        param.grad = numbers(5 + i, *param.shape, dtype=torch.float64, device=home(backend)) * sizes[i]
    norm = math.sqrt(sum(param.grad.square().sum() for param in params))
    SGD(params, lr=1.0, max_grad_norm=size / 4, backend=backend).step()
    for param, old in zip(params, before, strict=True):
        expected = old - param.grad * (size / 4 / (norm + 1e-6))
        torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=0)


@each_backend
@pytest.mark.parametrize("epsilon_hat", [False, True])
def test_a_bound_of_each_norm_bounds_a_tensor_among_others_as_alone(backend, epsilon_hat):
    together, alone = (parameters([(3,), (4,), ()], device=home(backend)) for _ in range(2))
    options = {"backend": backend, "clip_norm": 0.5, "epsilon_hat": epsilon_hat}
    optimizers = [Adam(together, **options), *[Adam([param], **options) for param in alone]]
    for step in range(2):
        for params in (together, alone):
            give_gradients(params, step)
        for optimizer in optimizers:
            optimizer.step()
    assert list(map(bits, together)) == list(map(bits, alone))


@each_backend
def test_a_step_without_gradients_has_no_norm_that_nobody_asked_for(backend):
    optimizer = SGD(parameters([(2,)], device=home(backend)), lr=0.5, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm is None
