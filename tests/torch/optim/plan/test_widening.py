"""A plan for more parameters than have a gradient leaves the others alone."""

import pytest
import torch

from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._plan import cache, widening

from ..support import BACKENDS, bits, give_some, home, parameters, take_steps

pytestmark = pytest.mark.usefixtures("at_once")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_copied_may_be_absent(backend, scale, dtype):
    """Gradients that lie otherwise than their parameters, or have another dtype, are copied if they are there."""
    params, alone = (parameters([(3, 4)] * 3, device=home(backend)) for _ in range(2))
    optimizer = Adam(params, backend=backend)
    others = [Adam([param], backend=backend) for param in alone]
    for number, present in enumerate([(1, 1, 1), (1, 1, 0), (0, 1, 0)]):
        for some in (params, alone):
            give_some(some, present, number)
            for param in some:
                grad, param.grad, param.grad_dtype = param.grad, None, None
                param.grad = None if grad is None else grad.t().contiguous().t().to(dtype)
        for each in (optimizer, *others):
            each.grad_scale, each.found_inf = torch.tensor(scale), torch.tensor(0.0)
            each.step()
    assert [bits(param) for param in params] == [bits(param) for param in alone]
    assert torch.equal(params[1].grad, alone[1].grad)


def test_a_plan_for_more_outlasts_others_that_were_used_since(monkeypatch):
    params = parameters([(3,)] * 4)
    optimizer = Adam(params, backend="native")
    take_steps(optimizer, params, [0b0011, 0b0101])
    monkeypatch.setattr(widening, "N_MISSED", 100)
    take_steps(optimizer, params, range(0b1000, 0b10000))
    before = optimizer._updater.plans.latest()
    take_steps(optimizer, params, [0b0110])
    assert set(optimizer._updater.plans.latest()) == set(before)


def move(param, state):
    param.data, state["exp_avg"] = param.data.t().contiguous().t(), state["exp_avg"].t()


def leave(param, state):
    pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("amsgrad", "change"), [(False, move), (True, leave)])
def test_a_plan_for_more_serves_a_part_whatever_the_others_become(backend, amsgrad, change):
    """Where some have states that others have not, the addresses of all are compared."""
    params = parameters([(3, 4)] * 3, device=home(backend))
    groups = [{"params": params[:1], "amsgrad": amsgrad}, {"params": params[1:]}]
    optimizer = Adam(groups, backend=backend)
    take_steps(optimizer, params, [0b111, 0b011])
    before = optimizer._updater.plans.latest()
    change(params[2], optimizer.state[params[2]])
    take_steps(optimizer, params, [0b001, 0b011])
    assert optimizer._updater.plans.latest() == before


def test_a_plan_for_more_serves_what_the_last_one_served():
    params = parameters([(3,)] * 4)
    optimizer = Adam(params, backend="native")
    take_steps(optimizer, params, [0b0011, 0b0101, 0b1000, 0b1001, 0b1010])
    before = optimizer._updater.plans.latest()
    take_steps(optimizer, params, [0b0110, 0b1110])
    assert set(optimizer._updater.plans.latest()) == set(before)


def test_parameters_that_never_step_together_may_share_memory():
    params = parameters([(3,)] * 3)
    optimizer = Adam(params, backend="native")
    params[1].data = params[0].data
    for number in range(12):
        give_some(params, [number % 2 == 0, number % 2 == 1, number % 3 == 0], number)
        optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [6, 6, 4]


def test_one_that_never_trains_may_share_memory_with_those_of_a_plan_for_more():
    params = parameters([(3,)] * 3)
    optimizer = Adam(params, backend="native")
    params[2].data = params[0].data
    take_steps(optimizer, params, [0b01, 0b10, 0b11])
    assert len(optimizer._updater.plans.latest()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps_between", [0, 1])
def test_a_state_that_was_taken_away_does_not_come_back_without_a_gradient(backend, steps_between):
    params = parameters([(3,)] * 3, device=home(backend))
    optimizer = Adam(params, backend=backend)
    give_some(params, (1, 1, 0), 0)
    optimizer.step()
    del optimizer.state[params[0]]
    for number, present in enumerate([(0, 1, 0)] * steps_between + [(0, 1, 1)]):
        give_some(params, present, number)
        optimizer.step()
    assert params[0] not in optimizer.state
    assert [float(optimizer.state[param]["step"]) for param in params[1:]] == [2 + steps_between, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["comes", "goes"])
def test_states_of_others_may_come_and_go_while_a_plan_serves_a_part(backend, change):
    """Plans are for all that have states, one behind the other, until one more has or one less."""
    params, alone = (parameters([(3,)] * 4, device=home(backend)) for _ in range(2))
    optimizer = Adam(params, backend=backend)
    others = [Adam([param], backend=backend) for param in alone]
    sets = [(1, 1, 1, 0), (1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 0, change == "comes"), (1, 1, 0, 0), (0, 1, 0, 0)]
    for number, present in enumerate(sets):
        if change == "goes" and number == 3:
            del optimizer.state[params[2]]
        give_some(params, present, number)
        give_some(alone, present, number)
        optimizer.step()
        for other in others:
            other.step()
    assert [bits(param) for param in params] == [bits(param) for param in alone]


def cut(param, state):
    param.data = param.data[:2]


def misshapen(param, state):
    state["exp_avg"] = torch.zeros(7, device=param.device)


def widened(param, state):
    param.data = param.data.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [cut, misshapen, widened])
def test_what_no_longer_fits_its_state_stays_out_of_a_plan_for_more(backend, change):
    params = parameters([(4,)] * 3, device=home(backend))
    optimizer = Adam(params, backend=backend)
    take_steps(optimizer, params, [0b111])
    change(params[2], optimizer.state[params[2]])
    before = dict(optimizer.state[params[2]])
    take_steps(optimizer, params, [0b011])
    assert [float(optimizer.state[param]["step"]) for param in params] == [2, 2, 1]
    assert all(value is before[key] for key, value in optimizer.state[params[2]].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_option_of_others_gives_them_no_state_before_their_step(backend):
    params = parameters([(4,)] * 3, device=home(backend))
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    take_steps(optimizer, params, [0b111])
    optimizer.param_groups[1]["amsgrad"] = True
    take_steps(optimizer, params, [0b011])
    assert "max_exp_avg_sq" not in optimizer.state[params[2]]


@pytest.mark.parametrize("step", [None, 3.5, torch.zeros(2)], ids=["none", "a number", "two"])
def test_a_counter_of_others_is_not_read_while_a_plan_serves_a_part(step):
    """The formula with epsilon-hat asks for the counts of all that step."""
    params = parameters([(3,)] * 3)
    optimizer = Adam(params, backend="native", epsilon_hat=True)
    take_steps(optimizer, params, [0b111])
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
    take_steps(optimizer, params, [0b101, 0b110])
    optimizer.state[params[2]]["step"] = step
    take_steps(optimizer, params, [0b011])
    assert [float(optimizer.state[param]["step"]) for param in params[:2]] == [3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_few_parameters_have_may_be_replaced(backend):
    params, alone = (parameters([(5,)] * 3, device=home(backend)) for _ in range(2))
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:], "amsgrad": True}], backend=backend)
    others = [Adam([param], backend=backend, amsgrad=index == 2) for index, param in enumerate(alone)]
    for number, present in enumerate([(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 1, 1)]):
        if number == 3:
            for state in (optimizer.state[params[2]], others[2].state[alone[2]]):
                state["max_exp_avg_sq"] = state["max_exp_avg_sq"] * 4
        for some in (params, alone):
            give_some(some, present, number)
        for each in (optimizer, *others):
            each.step()
    assert [bits(param) for param in params] == [bits(param) for param in alone]


@pytest.mark.parametrize("earlier", [(), ("other",)])
def test_the_last_plan_stays_when_plans_for_more_fill_the_cache(earlier):
    plans = cache.PlanCache()
    plans.n_kept = 1
    for name in (*earlier, "last but one"):
        plans._keep(((name,), None), object())
    last = object()
    plans._keep((("last",), bytes(1)), last)
    assert plans.latest() == [last]
