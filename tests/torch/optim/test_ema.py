"""`ema_decay` and `swap_ema`."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dragon.vm.torch.optim import SGD, Adam

BACKENDS = ["native", "triton", "eager"]


def trained(backend, make=Adam, dtype=torch.float32, n_steps=3, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 5), (1100,), (), (0,))]
    optimizer = make(params, lr=0.1, backend=backend, ema_decay=0.9, **options)
    averages = [param.detach().double() for param in params]
    for _ in range(n_steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        averages = [0.9 * a + 0.1 * p.detach().double() for a, p in zip(averages, params, strict=True)]
    return params, optimizer, averages


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("make", [Adam, SGD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_starts_at_the_parameter_and_follows_it(backend, make, flatten):
    params, optimizer, averages = trained(backend, make, flatten=flatten)
    for param, average in zip(params, averages, strict=True):
        torch.testing.assert_close(optimizer.state[param]["ema"].double(), average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_the_average_of_complex_parameters_is_complex(dtype, backend):
    # A cast of complex numbers to real ones would warn, which is an error here.
    param = torch.nn.Parameter(torch.tensor([1 + 2j, -3j, complex(torch.inf, 2)], dtype=dtype))
    optimizer = Adam([param], lr=0.1, ema_decay=0.5, backend=backend)
    first, param.grad = param.detach().clone(), torch.ones_like(param)
    optimizer.step()
    average = optimizer.state[param]["ema"]
    torch.testing.assert_close(average[:2], ((first + param.detach()) / 2)[:2])
    # Each part has its own average: an infinite one changes no other.
    assert average[2].imag == param[2].imag == 2


def test_pytorchs_averaged_model_is_the_same_if_it_begins_before_the_first_step():
    model = torch.nn.Linear(5, 3)
    optimizer = Adam(model.parameters(), lr=0.1, ema_decay=0.9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    for _ in range(3):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    with optimizer.swap_ema():
        for param, expected in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_an_average_in_fp32_keeps_what_bf16_parameters_lose(backend):
    params, optimizer, averages = trained(backend, dtype=torch.bfloat16, state_dtype=torch.float32)
    for param, average in zip(params, averages, strict=True):
        torch.testing.assert_close(optimizer.state[param]["ema"].double(), average, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_average_is_fp32_where_narrow_states_are_asked_for(backend, momentum):
    params, optimizer, averages = trained(backend, SGD, momentum=momentum, state_dtype=torch.bfloat16)
    for param, average in zip(params, averages, strict=True):
        assert optimizer.state[param]["ema"].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[param]["ema"].double(), average, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swap_ema_exchanges_for_the_length_of_the_block(backend):
    params, optimizer, _ = trained(backend)
    values = [param.detach().clone() for param in params]
    averages = [optimizer.state[param]["ema"].clone() for param in params]
    with optimizer.swap_ema():
        assert all(torch.equal(p, a) for p, a in zip(params, averages, strict=True))
        with pytest.raises(RuntimeError, match="inside swap_ema"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside swap_ema"):
            copy.deepcopy(optimizer)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    assert all(torch.equal(optimizer.state[p]["ema"], a) for p, a in zip(params, averages, strict=True))
    optimizer.step()


def test_swap_ema_ends_well_when_the_block_does_not():
    params, optimizer, _ = trained("native")
    value = params[0].detach().clone()
    with pytest.raises(KeyError), optimizer.swap_ema():
        raise KeyError
    assert torch.equal(params[0], value)


def test_swap_ema_refuses_an_average_of_another_shape_before_it_exchanges_any():
    params, optimizer, _ = trained("eager")
    # By broadcasting it would fit.
    params[1].data = torch.zeros(2, 1100)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"shape \(2, 1100\), but its state 'ema' shape \(1100,\)"):
        optimizer.swap_ema().__enter__()
    assert all(map(torch.equal, params, before))


def test_swap_ema_needs_averages():
    optimizer = Adam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="ema_decay"), optimizer.swap_ema():
        pass


def test_swap_ema_passes_by_what_has_no_average():
    (param, *_), optimizer, _ = trained("native")
    # Of others, and of a group without averages.
    optimizer.state["calls"] = 3
    plain = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [plain], "ema_decay": 0.0})
    plain.grad = torch.ones(4)
    optimizer.step()
    own, other = param.detach().clone(), plain.detach().clone()
    with optimizer.swap_ema():
        assert torch.equal(param, optimizer.state[param]["ema"])
        assert torch.equal(plain, other)
    assert torch.equal(param, own)


class Overridden(torch.Tensor):
    """Operations on it are not PyTorch's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func not in (torch.Tensor.clone, torch._foreach_copy_)
        return super().__torch_function__(func, types, args, kwargs)


def test_swap_ema_copies_numbers_whatever_a_subclass_does_instead():
    param = torch.nn.Parameter(torch.ones(3).as_subclass(Overridden))
    optimizer = Adam([param], ema_decay=0.9)
    param.grad = torch.ones(3)
    optimizer.step()
    own = param.tolist()
    with optimizer.swap_ema():
        assert param.tolist() == optimizer.state[param]["ema"].tolist() != own
    assert param.tolist() == own


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_are_in_checkpoints(backend):
    params, optimizer, _ = trained(backend)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    twin = Adam(twins, lr=0.1, backend=backend, ema_decay=0.9)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((params, optimizer), (twins, twin)):
        for param in each:
            param.grad = torch.ones_like(param)
        its.step()
    for param, other in zip(params, twins, strict=True):
        assert torch.equal(optimizer.state[param]["ema"], twin.state[other]["ema"])


@pytest.mark.parametrize(
    ("saved", "param", "asked", "expected"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.float64, torch.float32, None, torch.float64),
        (torch.float64, torch.float32, torch.float32, torch.float32),
        # No narrower than fp32 beside narrow states.
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_a_loaded_average_takes_the_asked_dtype_or_the_wider_one(saved, param, asked, expected):
    theirs, own = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (saved, param))
    theirs.grad = torch.ones_like(theirs)
    optimizer = Adam([theirs])
    optimizer.step()
    states = optimizer.state_dict()
    states["state"][0]["ema"] = torch.full((3,), 2.0, dtype=saved)
    other = Adam([own], state_dtype=asked, ema_decay=0.5)
    other.load_state_dict(states)
    assert other.state[own]["ema"].dtype == expected
    assert other.state[own]["ema"].tolist() == [2.0] * 3


def test_a_dict_without_averages_is_loaded_and_they_begin_at_the_next_step():
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    param = theirs.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    theirs.step()
    optimizer = Adam([param], ema_decay=0.5)
    optimizer.load_state_dict(theirs.state_dict())
    before = param.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["ema"], (before + param.detach()) / 2)


def test_a_loaded_average_without_a_decay_is_kept_as_it_is():
    (source, *_), optimizer, _ = trained("native")
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["ema_decay"]
    params = [param.detach().clone().requires_grad_() for param in optimizer.state]
    other = Adam(params)
    other.load_state_dict(saved)
    params[0].grad = torch.ones_like(params[0])
    other.step()
    assert torch.equal(other.state[params[0]]["ema"], optimizer.state[source]["ema"])


@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_a_loaded_average_of_another_shape_is_refused(algorithm):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = algorithm([param], lr=0.1, ema_decay=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["ema"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"has ema of shape \(2,\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[param]["ema"].shape == (3,)
