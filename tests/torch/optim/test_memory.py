"""An optimizer holds no tensor of the user's: what is taken away is freed, and each state is saved alone."""

import copy
import gc
import io
import weakref

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, give_gradients, home, parameters

SHAPES = [(16, 16)] * 3
OPTIONS = [{}, {"max_grad_norm": 1.0}, {"ema_decay": 0.9}, {"amsgrad": True}]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def no_garbage_collection():
    """What is in a cycle stays, and shows."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def stepped(backend, **options):
    """An optimizer after steps with all and with some of the parameters."""
    params = parameters(SHAPES, device=home(backend))
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, backend=backend, **options)
    for seed in range(3):
        give_gradients(params, seed)
        if seed == 1:
            params[0].grad = None
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer, params


def storages(optimizer):
    """Weak references to the states' tensors, and to what holds their memory; a plan keeps that of counters."""
    entries = [entry for state in optimizer.state.values() for entry in state.items()]
    held = [value.untyped_storage() for key, value in entries if key != "step"]
    return [weakref.ref(each) for each in [*held, *(value for _, value in entries)]]


def clear(optimizer):
    optimizer.state.clear()


def empty_each(optimizer):
    for state in optimizer.state.values():
        state.clear()


def move_each(optimizer):
    for state in optimizer.state.values():
        state.update({key: value.clone() for key, value in state.items()})


def load(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("take_away", [clear, empty_each, move_each, load])
def test_states_that_were_taken_away_are_freed_at_once(take_away, options, backend):
    optimizer, _ = stepped(backend, **options)
    old = storages(optimizer)
    assert old
    assert all(reference() is not None for reference in old)
    take_away(optimizer)
    assert [reference() for reference in old if reference() is not None] == []


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_parameter_that_was_taken_away_is_freed_at_once_with_its_gradient(options, backend):
    optimizer, params = stepped(backend, **options)
    give_gradients(params, 5)
    optimizer.step()
    param = params.pop(1)
    old = [weakref.ref(each.untyped_storage()) for each in (param, param.grad)]
    optimizer.param_groups[0]["params"] = [params[0]]
    del optimizer.state[param], param
    assert [reference() for reference in old] == [None, None]


@pytest.mark.parametrize("scaler", [True, torch.amp.GradScaler("cpu")], ids=["plain", "scaler"])
@pytest.mark.parametrize("n_steps", [0, 2])
def test_a_parameter_whose_gradient_was_released_is_freed_at_once(scaler, n_steps):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adam([{"params": [param]} for param in params], release_gradients=scaler)
    for _ in range(n_steps):
        loss = torch.stack(params).square().sum()
        if scaler is True:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        del loss
    param = params.pop(1)
    old = weakref.ref(param)
    del optimizer.param_groups[1]
    optimizer.state.pop(param, None)
    del param
    assert old() is None


def test_a_parameter_with_the_id_of_one_that_is_gone_is_released():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SGD(params, lr=1.0, release_gradients=True)
    sum(params).sum().backward()
    optimizer.step()
    optimizer.state.clear()
    del params[1], optimizer.param_groups[0]["params"][1]
    params.append(torch.nn.Parameter(torch.ones(3)))
    optimizer.param_groups[0]["params"].append(params[1])
    # As if it had the id of the other.
    optimizer._release._arranged = [[(id(param), True) for param in params]]
    # It may have had its gradient when it is found: then the step updates it.
    sum(params).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    sum(params).sum().backward()
    assert [param.grad for param in params] == [None, None]
    assert params[1].tolist() == [-1.0, -1.0, -1.0]


@each_backend
def test_an_optimizer_and_all_that_it_made_go_together(backend):
    optimizer, _ = stepped(backend)
    old = [weakref.ref(optimizer), *storages(optimizer)]
    del optimizer
    # PyTorch's optimizers hold themselves in a cycle, too.
    gc.collect()
    assert [reference() for reference in old if reference() is not None] == []


def test_groups_that_a_graph_follows_do_not_keep_their_optimizer_alive():
    params = parameters(SHAPES, device=home("triton"))
    optimizer = Adam(params, backend="triton", capturable=True)
    give_gradients(params, 0)
    optimizer.step()
    groups, old = optimizer.param_groups, weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert old() is None
    groups[0]["lr"] = 0.5
    assert groups[0]["lr"] == 0.5


def size(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return len(file.getvalue())


@each_backend
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_saving_or_copying_one_state_of_a_hundred_takes_one(algorithm, backend):
    params = parameters([(16, 16)] * 100, device=home(backend))
    optimizer = algorithm(params, backend=backend, **({"momentum": 0.9} if algorithm is SGD else {}))
    give_gradients(params, 0)
    optimizer.step()
    states = [optimizer.state[param] for param in params]
    key = "momentum_buffer" if algorithm is SGD else "exp_avg"
    alone = torch.zeros_like(params[0])
    assert size(states[0][key]) == size(alone)
    part = {index: states[index] for index in range(10)}
    assert size(part) == size({i: {k: v.detach().cpu().clone() for k, v in s.items()} for i, s in part.items()})
    assert copy.deepcopy(states[0][key]).untyped_storage().nbytes() == alone.nbytes
    states[0][key].untyped_storage().resize_(0)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in states[1].values())


def test_a_loaded_state_that_is_taken_away_is_freed():
    optimizer, params = stepped("eager")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moment = weakref.ref(optimizer.state.pop(params[0])["exp_avg"])
    assert moment() is None
