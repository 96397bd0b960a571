"""Gradients of parameters in flat buffers, wherever they lie."""

import math
import weakref

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._groups.buffers import make_buffers

from ..support import BACKENDS, bits, give_gradients, home, numbers, parameters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize(("scale", "zero_grad"), [(4.0, False), (4.0, True), (1.0, True)])
def test_a_gradient_that_is_shared_is_unscaled_and_zeroed_once(backend, flatten, is_first, scale, zero_grad):
    where = home(backend)
    params = [torch.nn.Parameter(torch.zeros(4, device=where)) for _ in range(3)]
    # The third is in no buffer.
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    groups = groups[::-1] if is_first else groups
    optimizer = SGD(groups, lr=1.0, flatten=flatten, backend=backend)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param in params[:2]:
        param.grad.fill_(8.0)
    params[2].grad = params[1].grad
    if scale != 1:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([scale]), torch.tensor([0.0])
    optimizer.step(zero_grad=zero_grad)
    for param in params:
        assert torch.equal(param.detach(), torch.full_like(param, -8.0 / scale))
        assert torch.equal(param.grad, torch.full_like(param, 0.0 if zero_grad else 8.0 / scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_from_sums_leaves_gradients_beside_a_buffer_alone(backend):
    params = [torch.nn.Parameter(torch.zeros(4, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, flatten=True, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.sum_grad()
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    assert [param.detach().tolist() for param in params] == [[-3.0] * 4] * 2
    assert [param.grad.tolist() for param in params] == [[2.0] * 4] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
@pytest.mark.parametrize(("scale", "zero_grad"), [(4.0, False), (1.0, True)])
def test_of_a_gradient_and_its_beginning_no_part_is_left(backend, sizes, scale, zero_grad):
    params = [torch.nn.Parameter(torch.zeros(size, device=home(backend))) for size in sizes]
    whole = torch.full((4,), 8.0, device=home(backend))
    for param in params:
        param.grad = whole[: len(param)]
    optimizer = SGD(params, lr=1.0, backend=backend)
    if scale != 1:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([scale]), torch.tensor([0.0])
    optimizer.step(zero_grad=zero_grad)
    for param in params:
        assert torch.equal(param.detach(), torch.full_like(param, -8.0 / scale))
    assert torch.equal(whole, torch.full_like(whole, 0.0 if zero_grad else 8.0 / scale))


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"clip_norm": 0.1}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.bfloat16, {"master_weights": "split16"}),
        (torch.float32, {"state_dtype": "8bit"}),
    ],
    ids=str,
)
def test_what_belongs_to_one_parameter_is_not_joined(backend, dtype, options):
    flat, apart = (parameters([(300,), (2, 200)], dtype=dtype, device=home(backend)) for _ in range(2))
    optimizers = [
        Adam(params, backend=backend, flatten=params is flat, rounding_seed=1, **options)
        for params in (flat, apart)
    ]
    for number in range(3):
        for params, optimizer in zip((flat, apart), optimizers, strict=True):
            give_gradients(params, number)
            optimizer.step()
    assert [bits(param) for param in flat] == [bits(param) for param in apart]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_parameter_that_moves_to_another_group_leaves_its_buffer(backend):
    flat, apart = (parameters([(5,), (2, 3)], device=home(backend)) for _ in range(2))
    for params in (flat, apart):
        optimizer = Adam(params, backend=backend, flatten=params is flat)
        for number in range(3):
            if number == 1:
                optimizer.add_param_group({"params": parameters([(4,)], device=home(backend)), "lr": 0.1})
                optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
            give_gradients(params, number)
            optimizer.step()
    assert [bits(param) for param in flat] == [bits(param) for param in apart]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_before", [0, 1])
def test_each_gradient_of_a_buffer_is_clipped_alone_once_its_group_clips(backend, n_before):
    params = [torch.nn.Parameter(torch.zeros(4, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, flatten=True, backend=backend)
    for number in range(n_before + 1):
        if number == n_before:
            optimizer.param_groups[0]["clip_norm"] = 1.0
        for param, value in zip(params, (10.0, 100.0), strict=True):
            param.grad = torch.full_like(param, value)
        optimizer.step()
    expected = torch.full((4,), 0.5)
    for param, value in zip(params, (10.0, 100.0), strict=True):
        torch.testing.assert_close(param.detach().cpu(), -expected - n_before * value)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_step_leaves_gradients_where_they_are(zero_grad):
    params = parameters([(3,), (2, 2), (5,)])
    optimizer = Adam(params, backend="native", flatten=True)
    for number in range(2):
        give_gradients(params, number)
        grads, before = [param.grad for param in params], [param.grad.clone() for param in params]
        places = [grad.data_ptr() for grad in grads]
        optimizer.step(zero_grad=zero_grad)
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert [grad.data_ptr() for grad in grads] == places
        expected = map(torch.zeros_like, before) if zero_grad else before
        assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_gradients_beside_a_buffer_are_unscaled_as_others_are(dtype):
    found = []
    for flatten in (False, True):
        params = parameters([(3,), (16, 40), (5,)], dtype=dtype)
        optimizer = Adam(params, backend="native", flatten=flatten, fused=True)
        give_gradients(params, 0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([3.0]), torch.tensor([0.0])
        optimizer.step()
        found.append([bits(param.grad) for param in params])
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_parameter(value):
    params = parameters([(3, 5), (17,), (), (1100,), (4, 4), (16,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9, backend="native", flatten=True)
    for first in (value, 1.0):
        for param in params:
            param.grad = torch.ones_like(param)
        params[1].grad[0] = first
        optimizer.step()
    assert [not bool(param.isfinite().all()) for param in params] == [index == 1 for index in range(6)]
    assert params[1][1:].isfinite().all()


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("parts", [False, True], ids=["alone", "another buffer in part meanwhile"])
def test_a_group_that_is_frozen_for_a_while_stays_in_its_buffer(backend, parts):
    found = []
    for flatten in (True, False):
        params = [param for _ in range(2) for param in parameters([(3,), (4, 4), (20,)], device=home(backend))]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
        optimizer = Adam(groups, backend=backend, flatten=flatten)
        for step in range(6):
            is_frozen = step in (0, 1, 4)
            for seed, param in enumerate(params):
                is_missing = (is_frozen and seed < 3) or (parts and step == 4 and seed == 5)
                param.grad = None if is_missing else numbers(step + seed, *param.shape).to(param)
            optimizer.step()
        found.append([*params, *(each for param in params for each in optimizer.state[param].values())])
        assert len(optimizer._updater.buffers) == (2 if flatten and backend == "native" else 0)
    assert [float(optimizer.state[param]["step"]) for param in params] == [3] * 3 + [6] * 2 + [5 if parts else 6]
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*found, strict=True))
    assert backend == "native" or all(map(torch.equal, *found))


def test_a_group_whose_parameters_moved_away_leaves_its_buffer():
    params = parameters([(3,), (4,)] * 2)
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:]}], flatten=True)
    give_gradients(params, 0)
    optimizer.step()
    gone = weakref.ref(optimizer._updater.buffers[0].values)
    for param in params[:2]:
        param.data, param.grad = param.data.clone(), None
    optimizer.step()
    assert len(optimizer._updater.buffers) == 1
    assert gone() is None


def test_every_tensor_of_a_buffer_begins_at_a_multiple_of_16_elements():
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (3, 17, 16, 1)]
    (buffer,) = make_buffers([{"params": params}])
    places = [(address - buffer.values.data_ptr()) / buffer.values.itemsize for address in buffer.addresses]
    assert places == [0, 16, 48, 64]


def test_buffers_that_inference_mode_made_are_trained():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with torch.inference_mode():
        optimizer = SGD(params, lr=1.0, flatten=True)
    (params[0] + 2 * params[1]).sum().backward()
    optimizer.step()
    assert [param.tolist() for param in params] == [[-1.0] * 2, [-2.0] * 2]


@pytest.mark.parametrize("options", [{"clip_value": 0.1}, {"max_grad_norm": 0.1, "clip_value": 1e-3}], ids=str)
@pytest.mark.parametrize("shapes", [[(3,), (5,), (7,)], [(3,), (5000,), (4000,)]], ids=["small", "large together"])
def test_gradients_of_a_buffer_are_limited_as_those_beside_one(shapes, options):
    found = []
    for flatten in (False, True):
        params = parameters(shapes)
        optimizer = SGD(params, lr=1.0, backend="native", flatten=flatten, **options)
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
        found.append(torch.cat([param.detach() for param in params]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_gradient_of_another_dtype_keeps_its_parameter_out_of_the_step_of_a_buffer(which, backend):
    found = []
    for flatten in (False, True):
        params = parameters([(4,)] * 3, device=home(backend))
        params[which].grad_dtype = None
        optimizer = Adam(params, lr=0.1, backend=backend, flatten=flatten)
        for step in range(3):
            give_gradients(params, step)
            if step:
                params[which].grad = params[which].grad.bfloat16()
            optimizer.step()
        found.append(torch.cat([param.detach() for param in params]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
