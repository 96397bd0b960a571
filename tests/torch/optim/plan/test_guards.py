"""A plan notices whatever changed under it: the step does what a fresh optimizer would do."""

import copy
import os
from collections import defaultdict

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._plan import guards

from ..support import BACKENDS, everything, give_gradients, home, like, parameters, twin

SHAPES = ((4, 4), (4, 4), (5,), (17,))


def transposed(tensor):
    """The same numbers, and the same strides backwards, in new memory."""
    return tensor.detach().t().clone(memory_format=torch.contiguous_format).t()


def swap_param_memory(optimizer, params):
    params[0].data = like(params[0])


def swap_param_memory_among_two(optimizer, params):
    params[0].data, params[1].data = like(params[1]), like(params[0])


def transpose_param_in_place(optimizer, params):
    params[0].data = params[0].data.t()


def widen_param(optimizer, params):
    grad, params[0].grad = params[0].grad, None
    params[0].data = params[0].data.double()
    params[0].grad = grad.double()


def swap_grad_object(optimizer, params):
    params[0].grad = like(params[0].grad) * 2


def swap_grad_memory(optimizer, params):
    params[0].grad.data = like(params[0].grad) * 2


def transpose_grad_at_the_same_address(optimizer, params):
    params[0].grad = params[0].grad.t()


def transpose_grad_object_at_the_same_address(optimizer, params):
    params[0].grad.data = params[0].grad.data.t()


def widen_grad(optimizer, params):
    params[0].grad_dtype = None
    params[0].grad = params[0].grad.double()


def shift_grad(optimizer, params):
    params[0].grad = torch.cat([params[0].grad.flatten()] * 2)[1:17].view(4, 4)


def negate_grad_at_the_same_address(optimizer, params):
    params[0].grad = torch._neg_view(params[0].grad)


def exchange_grads(optimizer, params):
    params[0].grad, params[1].grad = params[1].grad, params[0].grad


def expand_grad(optimizer, params):
    params[0].grad = torch.full((), 0.5, device=params[0].device).expand(4, 4)


def exchange_owners_of_states(optimizer, params):
    first, second = optimizer.state.pop(params[0]), optimizer.state.pop(params[1])
    rest = {param: optimizer.state.pop(param) for param in params[2:]}
    optimizer.state[params[1]], optimizer.state[params[0]] = first, second
    optimizer.state.update(rest)


def drop_grad(optimizer, params):
    params[1].grad = None


def swap_state_tensor(optimizer, params):
    key = state_key(optimizer)
    optimizer.state[params[0]][key] = like(optimizer.state[params[0]][key])


def swap_state_tensor_for_another_layout(optimizer, params):
    key = state_key(optimizer)
    optimizer.state[params[0]][key] = transposed(optimizer.state[params[0]][key])


def transpose_state_at_the_same_address(optimizer, params):
    state = optimizer.state[params[0]][state_key(optimizer)]
    state.data = state.data.t()


def swap_all_states_for_another_dtype(optimizer, params):
    for state in optimizer.state.values():
        for key in set(state) - {"step"}:
            state[key] = state[key].double()


def swap_state_memory(optimizer, params):
    state = optimizer.state[params[0]][state_key(optimizer)]
    state.data = like(state)


def move_all_states_as_optimizer_to_does(optimizer, params):
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                # What `.to(device)` of another device gives.
                value.data = value.data.clone()


def swap_state_memory_for_another_layout(optimizer, params):
    state = optimizer.state[params[0]][state_key(optimizer)]
    state.data = transposed(state)


def swap_step_memory(optimizer, params):
    step = optimizer.state[params[0]]["step"]
    step.data = torch.full_like(step, 7)


def swap_step_for_a_number(optimizer, params):
    optimizer.state[params[0]]["step"] = 7


def fill_step(optimizer, params):
    optimizer.state[params[0]]["step"].fill_(7)


def clear_state(optimizer, params):
    optimizer.state.clear()


def replace_state(optimizer, params):
    optimizer.state = defaultdict(dict, {param: dict(state) for param, state in optimizer.state.items()})


def replace_state_by_copies(optimizer, params):
    optimizer.state = defaultdict(dict, {p: copy.deepcopy(state) for p, state in optimizer.state.items()})


def replace_entry(optimizer, params):
    optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])


def delete_entry(optimizer, params):
    del optimizer.state[params[0]]


def empty_entry(optimizer, params):
    optimizer.state[params[0]].clear()


def move_param_to_the_other_group(optimizer, params):
    first, second = optimizer.param_groups
    first["params"].append(second["params"].pop(0))


def exchange_params_between_groups(optimizer, params):
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def take_a_param_away(optimizer, params):
    optimizer.param_groups[1]["params"].pop()


def append_a_param(optimizer, params):
    new = torch.nn.Parameter(like(params[2]))
    new.grad = like(params[2].grad)
    optimizer.param_groups[0]["params"].append(new)


def replace_a_param(optimizer, params):
    new = torch.nn.Parameter(like(params[2]))
    new.grad = like(params[2].grad)
    optimizer.param_groups[1]["params"][0] = new


def load_another_state_dict(optimizer, params):
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state[state_key(optimizer)] *= 2
    optimizer.load_state_dict(saved)


def remove_group(optimizer, params):
    optimizer.param_groups.pop(0)


def insert_group(optimizer, params):
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": []})


def swap_groups(optimizer, params):
    optimizer.param_groups.reverse()


def exchange_params_of_groups(optimizer, params):
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]


def replace_group_and_change_the_old_one(optimizer, params):
    old = optimizer.param_groups[0]
    optimizer.param_groups[0] = dict(old)
    old.update(lr=100.0, weight_decay=5.0)


def add_group(optimizer, params):
    new = torch.nn.Parameter(like(params[2]))
    new.grad = like(params[2].grad)
    optimizer.add_param_group({"params": [new], "lr": 0.5})


def setting(**options):
    """An edit of a group's options, named after them."""

    def edit(optimizer, params):
        optimizer.param_groups[1].update(options)

    edit.__name__ = ", ".join(f"{key}={value}" for key, value in options.items())
    return edit


def make_lr_a_tensor(optimizer, params):
    optimizer.param_groups[1]["lr"] = torch.tensor(0.3)


def state_key(optimizer):
    return "exp_avg" if isinstance(optimizer, Adam) else "momentum_buffer"


COMMON = [
    swap_param_memory, swap_param_memory_among_two, transpose_param_in_place, widen_param, swap_grad_object,
    widen_grad, shift_grad, negate_grad_at_the_same_address, exchange_grads,
    move_all_states_as_optimizer_to_does, exchange_params_between_groups, take_a_param_away, append_a_param,
    replace_a_param, load_another_state_dict, swap_grad_memory, transpose_grad_at_the_same_address,
    transpose_grad_object_at_the_same_address, expand_grad, drop_grad, swap_state_tensor,
    swap_state_tensor_for_another_layout, swap_all_states_for_another_dtype, transpose_state_at_the_same_address,
    exchange_owners_of_states, swap_state_memory, swap_state_memory_for_another_layout, swap_step_for_a_number,
    clear_state, replace_state, replace_state_by_copies, replace_entry, delete_entry, empty_entry,
    move_param_to_the_other_group, remove_group, insert_group, swap_groups, exchange_params_of_groups,
    replace_group_and_change_the_old_one, add_group, make_lr_a_tensor, setting(lr=0.5),
    setting(weight_decay=0.1), setting(maximize=True), setting(clip_value=0.1), setting(clip_norm=0.1),
    setting(ema_decay=0.9), setting(capturable=True),
]  # fmt: skip
ADAMS = [
    swap_step_memory, fill_step, setting(betas=(0.5, 0.5)), setting(eps=0.1),
    setting(amsgrad=True), setting(decoupled_weight_decay=True), setting(epsilon_hat=True),
]  # fmt: skip
SGDS = [setting(momentum=0), setting(dampening=0.5), setting(nesterov=True), setting(momentum=0.5)]
CASES = [(Adam, change) for change in COMMON + ADAMS] + [(SGD, change) for change in COMMON + SGDS]


def warm(algorithm, backend, shapes=SHAPES, **options):
    """An optimizer of two groups that has taken steps, with gradients for the next one."""
    params = parameters(shapes, device=home(backend))
    # A decay, so that there is something to decouple.
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2, "weight_decay": 0.3}]
    momentum = {} if algorithm is Adam else {"momentum": 0.9}
    optimizer = algorithm(groups, backend=backend, **momentum, **options)
    for seed in range(2):
        give_gradients(params, seed)
        optimizer.step()
    # In the same memory as before: only what the test changes is new.
    for param in params:
        param.grad.mul_(-0.5)
    return optimizer, params


def attempt(optimizer):
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return type(error), str(error)
    return None


def outcome(optimizer):
    """What two more steps make of it, or the error of the first."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    error = attempt(optimizer)
    if error is None:
        give_gradients(params, 5)
        error = attempt(optimizer)
    return error, everything(optimizer)


def check_change(algorithm, change, backend):
    optimizer, params = warm(algorithm, backend)
    assert optimizer._updater.plans.latest()[-1].gatherer._guard is not None
    change(optimizer, params)
    fresh = twin(optimizer)
    assert outcome(optimizer) == outcome(fresh)


# To the guards of kernels algorithms differ in their states alone: what both share is interpreted with Adam.
SHARED = [] if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else [
    (SGD, change, "triton")
    for change in COMMON if not {"state", "states", "entry"} & {*change.__name__.split("_")}
]  # fmt: skip
ON_BACKENDS = [case for case in ((*pair, name) for name in BACKENDS for pair in CASES) if case not in SHARED]


@pytest.mark.parametrize(("algorithm", "change", "backend"), ON_BACKENDS, ids=lambda v: getattr(v, "__name__", v))
def test_a_change_has_the_effect_that_it_has_on_a_fresh_optimizer(algorithm, change, backend):
    check_change(algorithm, change, backend)


@pytest.mark.parametrize(("algorithm", "change"), CASES, ids=lambda value: value.__name__)
def test_a_change_has_the_effect_beside_flat_buffers_that_it_has_without(algorithm, change):
    # Whole vectors of the processor: the last bits of others depend on where they lie.
    runs = [
        warm(algorithm, "native", ((4, 4), (4, 4), (16,), (32,)), flatten=flatten) for flatten in (True, False)
    ]
    for optimizer, params in runs:
        change(optimizer, params)
    assert outcome(runs[0][0]) == outcome(runs[1][0])


class NoTensorGuards:
    """PyTorch's guards as they are under a dispatch mode: they hold for no tensor."""

    def __init__(self, *tensors, **sizes):
        pass

    def check(self, *tensors):
        return False


@pytest.mark.parametrize(("algorithm", "change"), CASES, ids=lambda value: value.__name__)
def test_public_calls_notice_what_pytorchs_guards_notice(algorithm, change, monkeypatch):
    monkeypatch.setattr(guards, "TensorGuards", NoTensorGuards)
    check_change(algorithm, change, "native")


def is_planned_anew(change, backend, **options):
    """Whether a step after a change takes another plan than the one before."""
    optimizer, params = warm(Adam, backend, **options)
    plan = optimizer._updater.plans.latest()[-1]
    change(optimizer, params)
    optimizer.step()
    return optimizer._updater.plans.latest()[-1] is not plan


def test_moments_that_are_only_handed_on_may_move_under_a_plan():
    changes = swap_state_memory, swap_state_tensor, swap_step_memory, swap_param_memory
    anew = [is_planned_anew(change, "native") for change in changes]
    assert anew == [False, False, True, True]
    # Kernels read addresses, and buffers hold the states of their parameters. Formats with parts are left alone.
    assert all(is_planned_anew(change, "triton") for change in changes)
    moments = changes[:2]
    assert all(is_planned_anew(change, "native", flatten=True) for change in moments)
    assert all(is_planned_anew(change, "native", state_dtype=torch.bfloat16) for change in moments)


def test_parameters_that_came_to_share_memory_are_refused_under_a_plan():
    optimizer, params = warm(Adam, "native")
    params[0].data = params[1].data
    before = everything(optimizer)
    with pytest.raises(ValueError, match="params must not share memory"):
        optimizer.step()
    assert everything(optimizer) == before


def replace_by_view(state, key, dtype):
    state[key] = state[key].view(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [replace_by_view])
def test_a_state_of_another_dtype_at_the_same_address_is_noticed(change, backend):
    params = parameters(SHAPES, torch.bfloat16, home(backend))
    optimizer = Adam(params, backend=backend)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    state = optimizer.state[params[0]]
    address = state["exp_avg"].data_ptr()
    change(state, "exp_avg", torch.float16)
    assert state["exp_avg"].data_ptr() == address
    fresh = twin(optimizer)
    assert outcome(optimizer) == outcome(fresh)
