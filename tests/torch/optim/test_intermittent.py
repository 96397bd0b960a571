"""Parameters that get gradients only sometimes: each counts its own steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, bits, home, numbers, parameters, patient

histories = st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6)


def give(param, index, number):
    param.grad = numbers(10 * number + index, *param.shape, device=str(param.device))


@patient
@given(st.sampled_from(BACKENDS), st.sampled_from([Adam, SGD]), histories)
def test_a_parameter_is_updated_as_if_its_missing_steps_had_not_been(backend, algorithm, history):
    options = {"lr": 0.1} if algorithm is Adam else {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    shapes = [(5,), (17,), (2, 3)]
    together, alone = (parameters(shapes, device=home(backend)) for _ in range(2))
    optimizer = algorithm([{"params": together[:2]}, {"params": together[2:]}], backend=backend, **options)
    singles = [algorithm([param], backend=backend, **options) for param in alone]
    for number, present in enumerate(history):
        for i, has_grad in enumerate(present):
            together[i].grad = alone[i].grad = None
            if has_grad:
                give(together[i], i, number)
                give(alone[i], i, number)
                singles[i].step()
        optimizer.step()
    for i, (param, single) in enumerate(zip(together, alone, strict=True)):
        assert bits(param) == bits(single)
        n_steps = sum(present[i] for present in history)
        assert float(optimizer.state[param].get("step", 0) if param in optimizer.state else 0) == n_steps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_a_step_without_any_gradient_does_nothing(backend, algorithm):
    params = parameters([(5,)], device=home(backend))
    optimizer = algorithm(params, backend=backend, lr=0.1)
    before = bits(params[0])
    optimizer.step()
    assert bits(params[0]) == before
    assert not optimizer.state


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_patterns_of_missing_gradients_keep_few_plans(backend):
    params = parameters([(3,)] * 6, device=home(backend))
    optimizer = Adam(params, backend=backend)
    for pattern in range(1, 33):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if pattern >> i & 1 else None
        optimizer.step()
    assert len(optimizer._plans) <= 8
    assert [float(optimizer.state[param]["step"]) for param in params] == [16, 16, 16, 16, 16, 1]
