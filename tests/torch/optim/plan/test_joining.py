"""States that lie in flat buffers: they may go, come back, and be another's."""

import copy

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from ..groups.test_buffers import same
from ..support import home

BACKENDS = ["native", "triton", "eager"]
TAKES = [lambda optimizer: optimizer.state_dict(), lambda optimizer: dict(optimizer.state)]


def give_one(params, present, value):
    for index, (param, has_grad) in enumerate(zip(params, present, strict=True)):
        param.grad = torch.full_like(param, 0.1 + index + value) if has_grad else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["states", "moments", "moments of all", "parameters", "gradients"])
@pytest.mark.parametrize("sizes", [[4], [2, 2], [3, 1]], ids=str)
def test_states_may_exchange_their_places(backend, what, sizes):
    found = []
    for flatten in (False, True):
        params = [torch.nn.Parameter(torch.full((40,), float(i), device=home(backend))) for i in range(4)]
        # A buffer a group, but for a single parameter.
        groups = [{"params": params[: sizes[0]]}, *[{"params": params[sizes[0] :]}] * (len(sizes) - 1)]
        optimizer = Adam(groups, lr=0.1, backend=backend, flatten=flatten)
        first, *_, last = params
        for step in range(5):
            for index, param in enumerate(params):
                value = 0.1 + index + step
                if param.grad is None:
                    param.grad = torch.full_like(param, value)
                else:
                    param.grad.fill_(value)
            if step == 2:
                states = optimizer.state
                if what == "states":
                    states[first], states[last] = states[last], states[first]
                elif what == "moments":
                    states[first]["exp_avg"], states[last]["exp_avg"] = (
                        states[last]["exp_avg"], states[first]["exp_avg"],
                    )  # fmt: skip
                elif what == "moments of all":
                    moments = [states[param]["exp_avg"] for param in params]
                    for index, param in enumerate(params):
                        states[param]["exp_avg"] = moments[index - 1]
                elif what == "gradients":
                    first.grad, last.grad = last.grad, first.grad
                else:
                    first.data, last.data = last.data, first.data
            optimizer.step()
        found.append([*params, *(optimizer.state[param]["exp_avg"] for param in params)])
    assert same(*found, backend)


@pytest.mark.parametrize(
    "take", [lambda optimizer: optimizer.state_dict(), lambda optimizer: dict(optimizer.state)]
)
@pytest.mark.parametrize("n_present", [4, 3])
def test_earlier_states_may_come_back(take, n_present):
    found = []
    for flatten in (False, True):
        params = [torch.nn.Parameter(torch.full((40,), float(i))) for i in range(4)]
        optimizer = Adam(params, lr=0.1, flatten=flatten)
        for step in range(8):
            if step == 2:
                kept, states = take(optimizer), copy.deepcopy(optimizer.state_dict())
            if step == 4:
                optimizer.load_state_dict(states)
            if step == 6 and "state" in kept:
                optimizer.load_state_dict(kept)
            elif step == 6:
                optimizer.state.update(kept)
            give_one(params, [index < n_present or step != 5 for index in range(4)], step)
            optimizer.step()
        found.append([*params, *(optimizer.state[param]["exp_avg"] for param in params)])
    assert same(*found, "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}],
        [{"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9}],
        [{}, {"momentum": 0.9, "dampening": 0.5}],
        [{"momentum": 0.9, "dampening": 0.5}, {}],
    ],
    ids=str,
)
def test_buffers_may_differ_in_what_they_keep(backend, options):
    found = []
    for make in (torch.optim.SGD, SGD):
        params = [torch.nn.Parameter(torch.full((20,), float(i), device=home(backend))) for i in range(4)]
        own = {"backend": backend, "flatten": True} if make is SGD else {}
        groups = [{"params": params[2 * i : 2 * i + 2], **options[i]} for i in range(2)]
        optimizer = make(groups, lr=0.1, **own)
        for step in range(6):
            if step == 3:
                # Those that counted do so no more, and the others begin.
                for group, others in zip(optimizer.param_groups, reversed(options), strict=True):
                    group.update({"momentum": 0.0, "dampening": 0.0, **others})
            for index, param in enumerate(params):
                param.grad = torch.full_like(param, 1.0 + index - step)
            optimizer.step()
        found.append(params)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*found, strict=True))
