"""Every backend takes every step of SGD as right as torch's fused operation, judged from the step's own start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import SGD_OPTIONS, check_sgd, sgd_cases
from dragon.vm.torch.optim import SGD

from .support import BACKENDS, bits, give_some, home, maker, parameters, patient

OPTIONS = (*SGD_OPTIONS, "maximize")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FEW = {"max_groups": 2, "max_tensors": 2, "max_steps": 3}


@pytest.mark.parametrize("backend", BACKENDS)
@patient
@given(data=st.data())
def test_every_step_is_as_right_as_torchs_fused_one(backend, data):
    case = data.draw(sgd_cases(options=OPTIONS, dtypes=DTYPES, **FEW))
    check_sgd(maker(SGD, backend), case, device=home(backend))


@patient
@given(backend=st.sampled_from(["triton", "eager"]), data=st.data())
def test_momentum_of_half_precision_parameters_may_be_float32(backend, data):
    half = [torch.bfloat16, torch.float16]
    drawn = sgd_cases(options=OPTIONS, dtypes=half, gradient_dtypes=[None, torch.float32], **FEW)
    make = maker(SGD, backend, state_dtype=torch.float32)
    check_sgd(make, data.draw(drawn), state_dtype=torch.float32, device=home(backend))


@patient
@given(backend=st.sampled_from(BACKENDS), data=st.data())
def test_complex_parameters_are_pairs_of_real_ones(backend, data):
    case = data.draw(sgd_cases(dtypes=[torch.complex64, torch.complex128], **FEW))
    check_sgd(maker(SGD, backend), case, device=home(backend))


@patient
@given(sgd_cases(options=OPTIONS, dtypes=DTYPES, gradient_dtypes=[None, torch.float32]))
def test_the_backend_that_is_chosen_by_itself_takes_every_case(case):
    check_sgd(maker(SGD, None), case)


@pytest.mark.parametrize("value", [True, None])
def test_a_group_of_sgd_cannot_ask_for_stochastic_rounding(value):
    group = {"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], "stochastic_rounding": value}
    with pytest.raises(ValueError, match="SGD rounds to nearest: stochastic_rounding must be left out"):
        SGD([group])
    optimizer = SGD([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="SGD rounds to nearest"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.param_groups[0]["stochastic_rounding"] = value
    with pytest.raises(ValueError, match="SGD rounds to nearest"):
        optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}], ids=str)
def test_saved_states_have_the_entries_of_pytorchs(backend, options):
    params = parameters([(3,)] * 2, device=home(backend))
    saved = []
    for optimizer in (SGD(params, lr=0.1, backend=backend, **options), torch.optim.SGD(params, lr=0.1, **options)):
        give_some(params, (1, 1), 0)
        optimizer.step()
        saved.append({key: set(state) for key, state in optimizer.state_dict()["state"].items()})
    assert saved[0] == saved[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_is_of_its_own_group_alone(backend):
    params, alone = (parameters([(5,)] * 3, device=home(backend)) for _ in range(2))
    rates = (0.0, 0.9, 0.5)
    groups = [{"params": [param], "momentum": rate} for param, rate in zip(params, rates, strict=True)]
    optimizer = SGD(groups, lr=0.1, backend=backend)
    single = {"lr": 0.1, "backend": backend}
    others = [SGD([param], momentum=rate, **single) for param, rate in zip(alone, rates, strict=True)]
    for number in range(3):
        for some in (params, alone):
            give_some(some, (1, 1, 1), number)
        for each in (optimizer, *others):
            each.step()
    assert [bits(param) for param in params] == [bits(param) for param in alone]
