"""What a guard tells apart, and what a plan lives through."""

import gc
import weakref

import numpy as np
import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._plan import guards, widening
from dragon.vm.torch.optim._plan.guards import layout_guard

from ..support import BACKENDS, everything, give_gradients, give_some, home, like, parameters, take_steps, twin
from .test_guards import NoTensorGuards, attempt, outcome, warm

SHAPES = ((4, 4), (4, 4), (5,), (17,))


def alike():
    return torch.arange(6.0).view(2, 3)


OTHERS = {
    "shape": lambda t: t.view(3, 2),
    "strides": lambda t: t.as_strided((2, 3), (1, 2)),
    "dtype": lambda t: t.view(torch.int32),
    "negative": torch._neg_view,
    "conjugate": lambda t: torch.zeros(2, 3, dtype=torch.complex64).conj(),
    "device": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
    "type": lambda t: torch.nn.Parameter(t),
    "nothing": lambda t: None,
    "a number": lambda t: 0.5,
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("with_torch", [True, False], ids=["PyTorch's guards", "public calls"])
def test_a_layout_guard_holds_for_tensors_laid_out_alike_only(what, with_torch, monkeypatch):
    if not with_torch:
        monkeypatch.setattr(guards, "TensorGuards", NoTensorGuards)
    tensors = [alike(), alike()]
    guard = layout_guard(tensors)
    assert guard(alike(), tensors[0])
    try:
        holds = guard(tensors[0], OTHERS[what](tensors[1]))
    except (TypeError, AttributeError, RuntimeError):
        holds = False
    assert not holds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_a_tensor_learning_rate_is_read_at_every_step(algorithm, backend):
    lr = torch.tensor(0.1, device=home(backend))
    optimizer, _ = warm(algorithm, backend)
    for group in optimizer.param_groups:
        group["lr"] = lr.clone()
    attempt(optimizer)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.7)
    fresh = twin(optimizer)
    for group in fresh.param_groups:
        group["lr"] = 0.7 if home(backend) == "cpu" and lr.dtype == torch.float64 else float(torch.tensor(0.7))
    assert outcome(optimizer) == outcome(fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_learning_rate_may_be_replaced_by_an_equal_one(backend):
    optimizer, _ = warm(Adam, backend)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    attempt(optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    expected = twin(optimizer)
    optimizer.param_groups[0]["lr"].mul_(1)
    assert outcome(optimizer) == outcome(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_was_refused_leaves_no_parameter_behind(backend):
    optimizer, params = warm(Adam, backend)
    fresh = twin(optimizer)
    group = optimizer.param_groups[1]
    last, lr = group["params"].pop(), group["lr"]
    group["lr"] = "fast"
    with pytest.raises(TypeError, match="lr must be a number"):
        optimizer.step()
    group["params"].append(last)
    group["lr"] = lr
    assert outcome(optimizer) == outcome(fresh)
    assert len({float(optimizer.state[param]["step"]) for param in params}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_outlives_inference_mode(backend):
    optimizer, params = warm(Adam, backend)
    params[0].data = like(params[0])
    fresh = twin(optimizer)
    with torch.inference_mode():
        optimizer.step()
    fresh.step()
    assert outcome(optimizer) == outcome(fresh)


@pytest.mark.parametrize("numel", [3, 2**19 + 3])
def test_copies_of_gradients_outlive_inference_mode(numel):
    params = [torch.nn.Parameter(torch.ones(numel)) for _ in range(2)]
    for param, is_inference in zip(params, (False, True), strict=True):
        optimizer = Adam([param], lr=0.1, eps=0.1, clip_norm=0.5, backend="native")
        param.grad = torch.ones_like(param)
        with torch.inference_mode(is_inference):
            optimizer.step()
        param.grad = torch.full_like(param, 2.0)
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epsilon_hat", [False, True])
def test_counts_may_be_set_back_to_where_they_were_joined(backend, epsilon_hat):
    params = parameters([(3,)] * 3, device=home(backend))
    optimizer = Adam(params, lr=0.1, eps=0.1, epsilon_hat=epsilon_hat, backend=backend)
    give_gradients(params, 0)
    optimizer.step()
    for counts in [(4, 4, 5), (3, 4, 5), (4, 4, 4), (7, 1, 1), (7, 7, 1)]:
        for param, count in zip(params, counts, strict=True):
            optimizer.state[param]["step"].fill_(count)
        fresh = twin(optimizer)
        optimizer.step()
        fresh.step()
        assert everything(optimizer) == everything(fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_of_each_gradient_are_found_anew_at_each_step(backend):
    optimizer, params = warm(Adam, backend, clip_norm=0.5)
    for number in range(3):
        give_gradients(params, number)
        params[number].grad.mul_(1e-3)
        fresh = twin(optimizer)
        assert outcome(optimizer) == outcome(fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_tensor_of_somebody_else_may_stand_in_a_state(backend):
    optimizer, params = warm(Adam, backend)
    optimizer.state[params[0]]["mask"] = torch.ones(4, 4).to_sparse()
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(before, params[0])


def test_equal_copies_of_groups_and_states_are_followed():
    params = parameters([(8,)] * 3)
    optimizer = Adam([{"params": [param]} for param in params], lr=0.1, backend="native")
    give_gradients(params, 0)
    for _ in range(4):
        optimizer.step()
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]
    optimizer.state[params[1]] = dict(optimizer.state[params[1]])
    for _ in range(2):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.state[params[1]]["exp_avg"] = torch.full((8,), -100.0)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert (params[1] - before[1]).abs().max() > 1


@pytest.mark.parametrize("with_torch", [True, False], ids=["PyTorch's guards", "public calls"])
@pytest.mark.parametrize("n_plain", [0, 1, 2, 3])
def test_a_gradient_with_a_graph_keeps_it_beside_flat_buffers(with_torch, n_plain, monkeypatch):
    if not with_torch:
        monkeypatch.setattr(guards, "TensorGuards", NoTensorGuards)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adam(params, backend="native", flatten=True)
    for number in range(n_plain + 1):
        loss = sum((param**3).sum() for param in params)
        grads = torch.autograd.grad(loss, params, create_graph=number == n_plain)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is grad
        assert grad.grad_fn is not None


@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"capturable": True}, {"ema_decay": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_that_goes_leaves_nothing_to_the_garbage_collector(backend, options):
    params = parameters(SHAPES, device=home(backend))
    optimizer = Adam(params, backend=backend, **options)
    give_gradients(params, 0)
    optimizer.step()
    left = [weakref.ref(each) for each in (optimizer, optimizer._updater, *optimizer._updater.plans.latest())]
    gc.disable()
    try:
        del optimizer
        assert [reference() for reference in left] == [None] * len(left)
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_and_without_zeroing_take_turns(backend):
    (param,) = parameters([(3,)], device=home(backend))
    optimizer = SGD([param], lr=0.1, backend=backend)
    for zero_grad in (False, True, False, True):
        give_some([param], (1,), 0)
        optimizer.step(zero_grad=zero_grad)
        assert bool(param.grad.any()) == (not zero_grad)


def test_the_latest_eight_plans_are_kept_of_those_that_are_not_for_more(monkeypatch):
    monkeypatch.setattr(widening, "N_MISSED", 100)
    params = parameters([(3,)] * 4)
    optimizer = Adam(params, backend="native")
    take_steps(optimizer, params, [*range(1, 9), 1, 9])
    before, patterns = optimizer._updater.plans.latest(), [*range(3, 10), 1]
    take_steps(optimizer, params, patterns)
    assert set(optimizer._updater.plans.latest()) == set(before)
    present = [[i for i in range(4) if pattern >> i & 1] for pattern in patterns]
    assert [plan.gatherer.positions for plan in optimizer._updater.plans.latest()] == present


def test_a_state_dict_that_is_loaded_leaves_no_plan():
    """Numbers of random words stand in a table, and are no tensors that a guard would compare."""
    optimizer, _ = warm(Adam, "native")
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer._updater.plans.latest()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_no_other_number_comes_to_lie_where_a_counter_of_a_plan_was(backend):
    optimizer, params = warm(Adam, backend)
    state = optimizer.state[params[0]]
    memory = np.full((), float(state["step"]), np.float32)
    state["step"], reference = torch.from_numpy(memory), weakref.ref(memory)
    del memory
    attempt(optimizer)
    assert reference() == float(state["step"])
    # Allocators give freed memory to the next who asks, for numbers of another dtype too.
    state["step"] = torch.tensor(int(state["step"]))
    assert reference() is not None
    optimizer._updater.plans.forget()
    assert reference() is None
