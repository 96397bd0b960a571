"""Gradients that are shared, borrowed, conjugated or clipped apart, where memory could be written too early."""

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .judging import params_of

BACKENDS = ["native", "triton", "eager"]


def ones(n=4):
    return torch.nn.Parameter(torch.zeros(n))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"grad_scale": 0.5}, {"max_grad_norm": 1e9}, {}])
def test_one_gradient_may_update_two_parameters(backend, options):
    params = [ones(), ones()]
    optimizer = SGD(params, lr=1.0, backend=backend, **options)
    params[0].grad = params[1].grad = torch.ones(4)
    optimizer.step(zero_grad=True)
    assert torch.equal(params[0], params[1])
    assert (params[0] == -options.get("grad_scale", 1.0)).all()
    assert not params[0].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_may_enter_two_sums(backend):
    params = [ones(), ones()]
    optimizer = SGD(params, lr=1.0, backend=backend)
    for _ in range(2):
        params[0].grad = params[1].grad = torch.ones(4)
        optimizer.sum_grad()
    optimizer.step()
    assert all((param == -2).all() for param in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeroing_after_a_sum_zeroes_the_gradient_that_came_last(backend):
    param = ones()
    optimizer = SGD([param], lr=1.0, backend=backend)
    param.grad = torch.ones(4)
    optimizer.sum_grad()
    param.grad = torch.ones(4)
    optimizer.step(zero_grad=True)
    assert (param == -2).all()
    assert not param.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_gradients_are_clipped_each_on_its_own(backend):
    params = [ones(16), ones(16), ones(5)]
    optimizer = SGD(params, lr=1.0, clip_norm=1.0, flatten=True, backend=backend)
    for param, value in zip(params, (0.1, 1.0, 10.0), strict=True):
        param.grad = torch.full_like(param, value)
    optimizer.step()
    norms = [float(param.detach().norm()) for param in params]
    assert norms == pytest.approx([0.4, 1.0, 1.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_parameters_take_gradients_of_another_layout(backend):
    shapes = [(4, 3, 2, 2), (5,), (7,), (6,)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    params, twins = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizer = Adam(params, lr=0.1, epsilon_hat=False, flatten=True, backend=backend)
    twin = torch.optim.Adam(twins, lr=0.1)
    for step in range(4):
        if step == 1:
            params[0].data = params[0].data.to(memory_format=torch.channels_last)
        for param, other in zip(params, twins, strict=True):
            grad = torch.randn(param.shape, generator=generator)
            param.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        twin.step()
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_gradients_may_be_exchanged(backend):
    params = [ones(), ones()]
    optimizer = SGD(params, lr=1.0, flatten=True, backend=backend)
    for param, value in zip(params, (1.0, 2.0), strict=True):
        param.grad = torch.full_like(param, value)
    optimizer.step()
    params[0].grad, params[1].grad = params[1].grad, params[0].grad
    optimizer.step()
    assert all((param == -3).all() for param in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugated_and_negated_gradients_are_what_they_say(backend):
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = SGD([param], lr=1.0, backend=backend)
    param.grad = torch.full((3,), 1 + 1j).conj()
    optimizer.step()
    assert (param == -1 + 1j).all()
    real = ones(3)
    optimizer = SGD([real], lr=1.0, backend=backend)
    real.grad = torch._neg_view(torch.ones(3))
    optimizer.step()
    assert (real == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_may_be_switched_off_for_some(backend):
    params, twins = [ones(), ones()], [ones(), ones()]

    def groups(of):
        return [{"params": of[0], "momentum": 0.9}, {"params": of[1]}]

    pairs = [
        (params, SGD(groups(params), lr=0.1, backend=backend)),
        (twins, torch.optim.SGD(groups(twins), lr=0.1)),
    ]
    for step in range(4):
        for each, optimizer in pairs:
            for param in each:
                param.grad = torch.full_like(param, step + 1.0)
            optimizer.param_groups[0]["momentum"] = 0.0 if step == 2 else 0.9
            optimizer.step()
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_norm_is_a_number_of_its_own(backend):
    param = ones(1)
    optimizer = SGD([param], lr=1.0, max_grad_norm=1e9, backend=backend)
    norms = []
    for value in (2.0, 4.0, 6.0):
        param.grad = torch.full((1,), value)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert [float(norm) for norm in norms] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_is_no_dtype_of_ours(backend):
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float32))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = SGD([param], lr=1.0, grad_scale=0.5, backend=backend)
        param.grad = torch.ones(3, dtype=torch.float32)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert (param == -0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_steps_work_in_inference_mode(backend):
    params = [ones(), ones()]
    optimizer = Adam(params, lr=1.0, flatten=True, backend=backend)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(4)
        with torch.inference_mode():
            optimizer.step()
    assert torch.equal(params[0], params[1])
    assert float(params[0].detach()[0]) == pytest.approx(-3.0, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flat_optimizer_may_be_made_in_inference_mode(backend):
    params = [ones() for _ in range(4)]
    with torch.inference_mode():
        optimizer = Adam(params[:2], lr=1.0, flatten=True, backend=backend)
        optimizer.add_param_group({"params": params[2:]})
    for _ in range(3):
        torch.stack(params).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(param.is_inference() for param in params)
    assert all(float(param.detach()[0]) == pytest.approx(-3.0, abs=1e-5) for param in params)


def test_averages_are_not_exchanged_twice():
    param = ones()
    optimizer = Adam([param], ema_decay=0.5)
    param.grad = torch.ones(4)
    optimizer.step()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"), optimizer.swap_ema():
        pass
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_replaced_by_its_transpose_is_read_as_it_lies(backend):
    params = [torch.nn.Parameter(torch.zeros(3, 3)) for _ in range(2)]
    optimizers = [Adam(params[:1], backend=backend), torch.optim.Adam(params[1:])]
    optimizers[0].param_groups[0]["epsilon_hat"] = False
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        grad = torch.randn(3, 3, generator=generator)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            if step == 2:
                optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].t()
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_neighbours_in_memory_of_different_allocations_are_not_joined(backend):
    flat, plain = [[ones(16), ones(16)] for _ in range(2)]
    optimizers = [
        SGD(params, lr=0.1, momentum=0.9, backend=backend, flatten=params is flat) for params in (flat, plain)
    ]
    for number in (1.0, 2.0, 3.0):
        for optimizer in optimizers:
            for index, param in enumerate(params_of(optimizer)):
                param.grad = torch.full_like(param, number + index)
            optimizer.step()
        # Two storages of 64 bytes, one right behind the other.
        memory = bytearray(128)
        for index, param in enumerate(flat):
            buffer = torch.frombuffer(memory, dtype=torch.float32, count=16, offset=64 * index)
            optimizers[0].state[param]["momentum_buffer"] = buffer.copy_(
                optimizers[0].state[param]["momentum_buffer"]
            )
    assert all(map(torch.equal, flat, plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"max_grad_norm": 1e9}, {"clip_norm": 1e9}], ids=str)
def test_a_default_device_elsewhere_changes_nothing(backend, options):
    params = [ones(), ones(7)]
    with torch.device("meta"):
        optimizer = Adam(params, lr=1.0, backend=backend, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(param.device.type == "cpu" and (param < -1).all() for param in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaler_that_finds_no_gradient_lets_a_sum_be_used(backend):
    param = ones()
    # PyTorch's scaler refuses a step without gradients of an optimizer that does not unscale itself.
    optimizer = SGD([param], lr=1.0, backend=backend, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    optimizer.sum_grad()
    scaler.step(optimizer)
    assert (param == -1).all()
    assert optimizer.n_skipped_steps == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_weight_decay_of_one_element_is_its_number(backend, decoupled):
    results = []
    for weight_decay in (0.5, torch.tensor([0.5]), torch.tensor(0.5)):
        param = torch.nn.Parameter(torch.ones(4))
        optimizer = Adam([param], backend=backend, decoupled_weight_decay=decoupled, eps=0.1)
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        for _ in range(2):
            param.grad = torch.ones(4)
            optimizer.step()
        results.append(param.detach())
    assert all(torch.equal(result, results[0]) for result in results)
    assert (results[0] < 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["zero_grad", "step"])
def test_conjugated_gradients_are_zeroed(backend, how):
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = SGD([param], lr=1.0, backend=backend)
    param.grad = torch.full((3,), 1 + 1j).conj()
    if how == "step":
        optimizer.step(zero_grad=True)
        assert (param == -1 + 1j).all()
    else:
        optimizer.zero_grad(set_to_none=False)
    assert not param.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_underflowed_skips_as_any_other(backend):
    param = ones()
    optimizer = Adam([param], backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.zeros(1), torch.ones(1)
    param.grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert not param.any()
    assert optimizer.n_skipped_steps == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_between_gradients_of_the_users_is_left_alone(backend):
    params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(3)]
    optimizer = SGD(params, lr=1.0, flatten=True, max_grad_norm=1e9, backend=backend)
    memory = torch.full((48,), 7.0)
    views = [memory[16 * i : 16 * i + 10] for i in range(3)]
    for param, view in zip(params, views, strict=True):
        param.grad = view.fill_(1.0)
    optimizer.step(zero_grad=True)
    assert float(optimizer.grad_norm) == pytest.approx(30**0.5)
    assert all((memory[16 * i + 10 : 16 * i + 16] == 7).all() for i in range(3))
    assert all((param == -1).all() for param in params)


@pytest.mark.parametrize("name", ["weight_decay", "eps"])
def test_a_number_on_another_device_is_refused(name):
    param = ones()
    optimizer = Adam([param], backend="native")
    optimizer.param_groups[0][name] = torch.tensor(0.5, device="meta")
    param.grad = torch.ones(4)
    with pytest.raises(
        ValueError, match=f"{name} must be a number or a tensor on the CPU, but got a tensor on meta"
    ):
        optimizer.step()
    assert not param.any()
