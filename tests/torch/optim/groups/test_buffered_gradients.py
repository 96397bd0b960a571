"""Gradients of parameters in flat buffers, wherever they lie."""

import math
import weakref

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._groups.buffers import make_buffers

from ..interrupts import Interrupt, Tracer
from ..support import BACKENDS, bits, give_gradients, home, numbers, parameters
from ..test_interrupts import OURS


def test_a_gradient_object_that_moves_away_is_not_followed():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    options = {"lr": 0.1, "backend": "native"}
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = Adam(groups, flatten=True, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(2)
        optimizer.step()
    moved = params[2].grad
    params[2].grad = moved.detach()
    moved.data = torch.full((2,), -100.0)
    before = params[2].detach().clone()
    optimizer.step()
    assert (params[2] < before).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("another_new", [[], [1], [2]], ids=["none", "of the buffer", "of another buffer"])
def test_a_gradient_in_the_place_of_an_object_that_moved_away_is_zeroed(backend, another_new):
    params = [torch.nn.Parameter(torch.zeros(2, device=home(backend))) for _ in range(4)]
    optimizer = SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0, backend=backend, flatten=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = params[0].grad
    params[0].grad = moved.detach()
    moved.data = torch.full_like(moved, -100.0)
    for index in another_new:
        params[index].grad = torch.ones_like(params[index])
    optimizer.step(zero_grad=True)
    assert [param.tolist() for param in params] == [[-2.0] * 2] * 4
    assert [param.grad.tolist() for param in params] == [[0.0] * 2] * 4
    assert moved.tolist() == [-100.0] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_another_object", [False, True])
def test_a_gradient_that_lies_otherwise_in_its_own_place_is_moved(backend, is_another_object):
    params = [torch.nn.Parameter(torch.zeros(2, 2, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, backend=backend, flatten=True)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    if is_another_object:
        params[0].grad = params[0].grad.detach().t()
    else:
        params[0].grad.data = params[0].grad.data.t()
    params[0].grad.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer.step()
    assert params[0].tolist() == [[-1.0, -2.0], [-3.0, -4.0]]


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


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_gradient_in_its_place_stays_there_while_another_one_moves(backend):
    params = [torch.nn.Parameter(torch.ones(4, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, backend=backend, flatten=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept, params[1].grad = params[0].grad, torch.ones_like(params[1])
    optimizer.step(zero_grad=True)
    assert params[0].grad is kept
    assert not any(param.grad.any() for param in params)


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
def test_parameters_may_exchange_their_places_for_gradients(backend):
    params = [torch.nn.Parameter(torch.zeros(4, device=home(backend))) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, flatten=True, backend=backend)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, value in zip(params, (1.0, 2.0), strict=True):
        param.grad.fill_(value)
    params[0].grad, params[1].grad = params[1].grad, params[0].grad
    optimizer.step()
    assert [param.detach().tolist() for param in params] == [[-2.0] * 4, [-1.0] * 4]


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


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("parts", [False, True], ids=["alone", "another buffer parts meanwhile"])
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
        assert len(optimizer._updater.buffers) == flatten * (1 if parts else 2)
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


def test_the_padding_between_sums_has_no_part_in_their_norm():
    """Memory that nothing was written to is NaN here."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, backend="native", flatten=True, max_grad_norm=100.0)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.sum_grad()
    torch.use_deterministic_algorithms(True)
    try:
        optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(optimizer.grad_norm) == pytest.approx(2 * math.sqrt(6))


def test_every_tensor_of_a_buffer_begins_at_a_multiple_of_16_elements():
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (3, 17, 16, 1)]
    (buffer,) = make_buffers([{"params": params}])
    for flat, addresses in ((buffer.values, buffer.addresses), (buffer.grads, buffer.grad_addresses)):
        assert [(address - flat.data_ptr()) / flat.itemsize for address in addresses] == [0, 16, 48, 64]


def test_buffers_that_inference_mode_made_are_trained():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with torch.inference_mode():
        optimizer = SGD(params, lr=1.0, flatten=True)
    (params[0] + 2 * params[1]).sum().backward()
    optimizer.step()
    assert [param.tolist() for param in params] == [[-1.0] * 2, [-2.0] * 2]


def test_an_interrupt_while_a_buffer_parts_leaves_no_counter_shared():
    def parting():
        params = parameters([(3,)] * 3)
        optimizer = Adam(params, backend="native", flatten=True)
        give_gradients(params, 0)
        optimizer.step()
        params[1].grad = params[2].grad = None
        return params, optimizer

    folder = f"{OURS}/_plan/preparation.py"
    counter = Tracer(None, folder)
    counter.run(parting()[1].step)
    assert counter.count > 300
    for at in range(1, counter.count + 1):
        params, optimizer = parting()
        with pytest.raises(Interrupt):
            Tracer(at, folder).run(optimizer.step)
        for param in params[1:]:
            params[0].grad = params[1].grad = params[2].grad = None
            param.grad = torch.ones_like(param)
            optimizer.step()
        counts = [float(optimizer.state[param]["step"]) for param in params]
        assert counts in ([1.0, 2.0, 2.0], [2.0, 2.0, 2.0]), at


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_nan_does_not_stay_in_the_padding_between_joined_gradients(backend):
    params = parameters([(3, 5), (17,), (), (0,), (1100,), (4, 4), (16,)], device=home(backend))
    optimizer = Adam(params, backend=backend, flatten=True, max_grad_norm=1.0)
    for value, expected in ((math.nan, math.nan), (math.inf, math.inf), (1.0, None)):
        optimizer.zero_grad(set_to_none=True)
        for param in params:
            param.grad = torch.ones_like(param)
        params[1].grad.flatten()[0] = value
        optimizer.step()
        numel = sum(param.numel() for param in params)
        norm = math.sqrt(numel) if expected is None else expected
        assert float(optimizer.grad_norm) == pytest.approx(norm, nan_ok=True)
