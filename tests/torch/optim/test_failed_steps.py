"""An error that `step` raises has changed nothing, and the next step is as ever."""

import numpy as np
import pytest
import torch

from dragon.vm.torch.optim import Adam

from .support import BACKENDS, everything, give_gradients, home, parameters, twin

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def sparse_grad(optimizer, last):
    last.grad = torch.ones(4).to_sparse().to(last.device)


def overlapping_params(optimizer, last):
    last.data = optimizer.param_groups[0]["params"][0].data[:4]


def expanded_param(optimizer, last):
    last.data = torch.zeros(1, device=last.device).expand(4)


def option(name, value):
    def spoil(optimizer, last):
        optimizer.param_groups[-1][name] = value

    spoil.__name__ = f"{name}={value}"
    return spoil


def lost_option(optimizer, last):
    del optimizer.param_groups[-1]["weight_decay"]


def misshapen_state(optimizer, last):
    optimizer.state[last]["exp_avg"] = torch.zeros(3, device=last.device)


def broadcastable_state(optimizer, last):
    optimizer.state[last]["exp_avg"] = torch.zeros((), device=last.device)


def complex_state(optimizer, last):
    optimizer.state[last]["exp_avg"] = torch.zeros(4, dtype=torch.complex64, device=last.device)


def average_of_integers(optimizer, last):
    optimizer.param_groups[1]["ema_decay"] = 0.5
    optimizer.state[last]["ema"] = torch.zeros(4, dtype=torch.int32, device=last.device)


def state_that_is_no_tensor(optimizer, last):
    optimizer.state[last]["exp_avg"] = "zeros"


def misshapen_step(optimizer, last):
    optimizer.state[last]["step"] = torch.zeros(2)


def step_that_is_no_number(optimizer, last):
    optimizer.state[last]["step"] = "one"


SPOILS = [
    sparse_grad,
    overlapping_params,
    expanded_param,
    lost_option,
    misshapen_state,
    broadcastable_state,
    complex_state,
    average_of_integers,
    state_that_is_no_tensor,
    misshapen_step,
    step_that_is_no_number,
    option("lr", None),
    option("lr", "fast"),
    option("lr", torch.ones(2)),
    option("betas", (0.9,)),
    option("betas", None),
    option("eps", None),
    option("weight_decay", "some"),
    option("clip_value", "little"),
    option("clip_norm", None),
    option("grad_scale", None),
    option("ema_decay", "slow"),
    option("lr", torch.ones((), device="meta")),
    option("lr", torch.tensor(1j)),
    option("betas", (torch.ones((), device="meta"), torch.ones((), device="meta"))),
    option("maximize", torch.tensor([True, False])),
    option("epsilon_hat", np.array([True, False])),
    option("decoupled_weight_decay", torch.tensor([True, False])),
]


def spoilt(backend, warm, dtype, **options):
    """An optimizer of two groups, warm or not, with gradients."""
    params = parameters([(8,), (3,), (4,)], dtype, home(backend))
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = Adam(groups, backend=backend, **options)
    for seed in range(int(warm)):
        give_gradients(params, seed)
        optimizer.step()
    give_gradients(params, 7)
    return optimizer, params


@each_backend
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_an_error_of_step_has_changed_nothing(spoil, warm, backend):
    optimizer, params = spoilt(backend, warm, torch.float32)
    spoil(optimizer, params[-1])
    before, gradients = everything(optimizer), [param.grad.clone() for param in params]
    with pytest.raises((RuntimeError, ValueError, TypeError, KeyError)):
        optimizer.step()
    assert everything(optimizer) == before
    for param_, gradient in zip(params[:-1], gradients[:-1], strict=True):
        assert torch.equal(param_.grad, gradient)


@each_backend
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_a_complex_parameter_takes_no_real_state(warm, backend):
    optimizer, params = spoilt(backend, warm, torch.complex64)
    optimizer.state[params[-1]]["exp_avg"] = torch.zeros(4, dtype=torch.float64, device=params[-1].device)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"a parameter is of torch.complex64, but its state 'exp_avg' of torch.f"):
        optimizer.step()
    assert everything(optimizer) == before


@each_backend
@pytest.mark.parametrize("names", [["exp_avg"], ["exp_avg_sq"], ["exp_avg", "exp_avg_sq"]], ids="+".join)
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"amsgrad": True}], ids=str)
def test_no_moment_begins_beside_what_has_begun(options, names, backend):
    optimizer, params = spoilt(backend, True, torch.float32, **options)
    state = optimizer.state[params[-1]]
    for name in names:
        del state[name]
    before = everything(optimizer)
    with pytest.raises(
        ValueError, match=rf"^the state of a parameter of shape \(4,\) has no {names[0]}: it has step"
    ):
        optimizer.step()
    assert everything(optimizer) == before
    # PyTorch raises a KeyError then too. A count of 0 has begun nothing.
    state.clear()
    state["step"] = 0
    optimizer.step()
    assert float(state["step"]) == 1


@each_backend
def test_after_an_error_that_is_mended_the_step_is_as_ever(backend):
    optimizer, params = spoilt(backend, False, torch.float32)
    expected = twin(optimizer)
    good, params[-1].grad = params[-1].grad, torch.ones(4, device=params[-1].device).to_sparse()
    with pytest.raises(
        RuntimeError, match=r"^Adam does not support sparse gradients, please consider SparseAdam instead$"
    ):
        optimizer.step()
    params[-1].grad = good
    optimizer.step()
    expected.step()
    assert everything(optimizer) == everything(expected)


@each_backend
def test_an_error_leaves_the_sums_of_gradients(backend):
    optimizer, params = spoilt(backend, False, torch.float32)
    expected = twin(optimizer)
    for each in (optimizer, expected):
        each.sum_grad()
        give_gradients([p for group in each.param_groups for p in group["params"]], 8)
    lr, optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"], "fast"
    with pytest.raises(TypeError, match="lr must be a number, but got 'fast'"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = lr
    optimizer.step()
    expected.step()
    assert everything(optimizer) == everything(expected)
    assert all(param_.grad is not None for param_ in params)


def test_a_step_that_is_refused_adds_nothing_to_a_sum():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([param])
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    param.grad = torch.ones(3)
    optimizer.state[param]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()
    assert optimizer._sums.totals[param].tolist() == [1.0] * 3
