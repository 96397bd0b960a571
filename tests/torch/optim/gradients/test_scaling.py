"""Factors of gradients where parameter groups differ, in each backend."""

import math

import pytest
import torch

from dragon.vm.torch.optim import SGD

from ..support import BACKENDS, home

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def updates(backend, grads, groups, **options):
    """What a step with a learning rate of 1 takes from parameters of one element, and the norm that it notes."""
    params = [torch.nn.Parameter(torch.zeros(1, device=home(backend))) for _ in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.full_like(param, grad)
    members = [{"params": [param], **group} for param, group in zip(params, groups, strict=True)]
    optimizer = SGD(members, lr=1.0, backend=backend, **options)
    optimizer.step()
    return [-param.item() for param in params], optimizer.grad_norm


@each_backend
@pytest.mark.parametrize(("norm_type", "norm"), [(2, math.hypot(0.3, 8.0, 0.2)), (math.inf, 8.0)])
def test_the_norm_is_of_gradients_times_the_factors_of_their_groups(backend, norm_type, norm):
    groups = [{"grad_scale": 0.1}, {"grad_scale": 2.0, "maximize": True}, {"grad_scale": 0.1}]
    taken, found = updates(backend, [3.0, 4.0, 2.0], groups, max_grad_norm=1.0, norm_type=norm_type)
    assert found.item() == pytest.approx(norm, rel=1e-15, abs=0)
    assert taken == pytest.approx([0.3 / norm, -8.0 / norm, 0.2 / norm], rel=1e-6)


@each_backend
def test_the_largest_magnitude_counts_times_the_factor_of_its_group(backend):
    taken, found = updates(backend, [5.0], [{"grad_scale": 0.1}], max_grad_norm=0.1, norm_type=math.inf)
    assert found.item() == 0.5
    assert taken == pytest.approx([0.1], rel=1e-5)


@each_backend
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_each_group_has_a_clip_norm_of_its_own_or_none(backend, order):
    cases = [(3.0, {"clip_norm": 1.0}, 1.0), (4.0, {}, 4.0), (8.0, {"clip_norm": 2.0}, 2.0)]
    grads, groups, expected = zip(*(cases[i] for i in order), strict=True)
    assert updates(backend, list(grads), list(groups))[0] == list(expected)


@each_backend
def test_a_norm_near_zero_is_clipped_as_by_pytorch(backend):
    theirs = torch.nn.Parameter(torch.zeros(1))
    theirs.grad = torch.full((1,), 1e-6)
    torch.nn.utils.clip_grad_norm_([theirs], 1e-6)
    taken, _ = updates(backend, [1e-6], [{}], max_grad_norm=1e-6)
    assert taken == pytest.approx([theirs.grad.item()], rel=1e-6)


@each_backend
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e9}, {"clip_norm": 1e9}], ids=str)
def test_fp64_gradients_are_divided_by_the_loss_scale_in_fp64(backend, options):
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=home(backend)))
    optimizer = SGD([param], lr=1.0, fused=True, backend=backend, **options)
    param.grad = torch.ones_like(param)
    optimizer.grad_scale = torch.full((1,), 3.0, device=home(backend))
    optimizer.step()
    assert -param.item() == pytest.approx(1 / 3, rel=1e-15, abs=0)
    assert param.grad.item() == pytest.approx(1 / 3, rel=1e-15, abs=0)


@each_backend
def test_an_infinite_clip_value_leaves_an_infinite_gradient(backend):
    assert updates(backend, [math.inf], [{"clip_value": math.inf}])[0] == [math.inf]


@each_backend
@pytest.mark.parametrize("options", [{"clip_norm": 3.0}, {"max_grad_norm": 3.0}], ids=str)
def test_a_gradient_to_maximize_is_clipped_by_its_size_times_the_factor(backend, options):
    taken, _ = updates(backend, [4.0], [{"grad_scale": 2.0, "maximize": True}], **options)
    assert taken == pytest.approx([-3.0], rel=1e-6)


@each_backend
@pytest.mark.parametrize("options", [{}, {"clip_norm": 3.0}, {"max_grad_norm": 3.0}], ids=str)
def test_a_loss_scale_that_underflowed_to_zero_leaves_nothing_finite(backend, options):
    param = torch.nn.Parameter(torch.zeros(2, device=home(backend)))
    param.grad = torch.tensor([1.0, 0.0], device=home(backend))
    optimizer = SGD([param], lr=1.0, backend=backend, **options)
    optimizer.grad_scale, optimizer.found_inf = (torch.zeros(1, device=home(backend)) for _ in range(2))
    optimizer.step()
    assert not param.isfinite().any()


@each_backend
def test_a_gradient_of_another_dtype_than_its_parameter_has_its_own_norm(backend):
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16, device=home(backend)))
    param.grad_dtype = None
    param.grad = torch.tensor([3.0, 4.0], device=home(backend))
    optimizer = SGD([param], lr=1.0, backend=backend, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 5


@each_backend
def test_a_norm_that_was_read_stays_when_another_step_has_another(backend):
    param = torch.nn.Parameter(torch.zeros(2, device=home(backend)))
    optimizer = SGD([param], lr=1.0, backend=backend, max_grad_norm=1.0)
    found = []
    for size in (1.0, 2.0):
        param.grad = size * torch.tensor([3.0, 4.0], device=home(backend))
        optimizer.step()
        found.append(optimizer.grad_norm)
    param.grad = None
    optimizer.step()
    assert [norm.item() for norm in found] == [5.0, 10.0]


@each_backend
@pytest.mark.parametrize("of_group", [True, False])
def test_a_gradient_that_parameters_share_is_scaled_for_each_of_them_once(backend, of_group):
    params = [torch.nn.Parameter(torch.zeros(2, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, backend=backend)
    for scale, value in ((1.0, -3.0), (0.5, -4.5)):
        if of_group:
            optimizer.param_groups[0]["grad_scale"] = scale
        else:
            optimizer.grad_scale = torch.full((1,), 1 / scale, device=home(backend))
            optimizer.found_inf = torch.zeros(1, device=home(backend))
        params[0].grad = params[1].grad = torch.full((2,), 3.0, device=home(backend))
        optimizer.step(zero_grad=True)
        assert [param.tolist() for param in params] == [[value] * 2] * 2


@pytest.mark.parametrize("value", [3.0, math.inf])
def test_kernels_beside_the_host_clip_skip_and_zero_as_it_decides(value):
    found = []
    for backend in ("triton", "eager"):
        # No kernel updates what is not dense.
        params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, 2)[:, 0])]
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer = SGD(params, lr=1.0, backend=backend, max_grad_norm=1.0, skip_nonfinite=True)
        optimizer.step(zero_grad=True)
        assert optimizer.n_skipped_steps == math.isinf(value)
        found.append([torch.cat([*params]).tolist(), torch.cat([param.grad for param in params]).tolist()])
    assert found[0][1] == [0.0] * 4
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)


@each_backend
def test_each_gradient_is_clipped_by_its_unscaled_norm_whatever_its_clip_value(backend):
    param = torch.nn.Parameter(torch.zeros(1, device=home(backend)))
    param.grad = torch.full_like(param, 24.0)
    optimizer = SGD([param], lr=1.0, backend=backend, clip_norm=2.0, clip_value=0.5)
    optimizer.grad_scale = torch.full((1,), 8.0, device=home(backend))
    optimizer.step()
    assert param.item() == -2.0
