"""Every backend takes every step of Adam as right as torch's fused operation, judged from the step's own start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import ADAM_OPTIONS, DENSE_LAYOUTS, AdamOptions, adam_cases, check_adam
from dragon.vm.torch.optim import Adam, AdamW

from .support import BACKENDS, everything, home, maker, patient

FLAGS = ("maximize", "decoupled_weight_decay")
SCALING = ("grad_scale", "clip_value")
# The native backend leaves gradients scaled, which the harness takes for an error, and clips half precision
# gradients to a bound of their dtype, as `torch.nn.utils.clip_grad_value_` does; see test_chain.
OPTIONS = {backend: (*ADAM_OPTIONS, *FLAGS, *(SCALING if backend != "native" else ())) for backend in BACKENDS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# An interpreted program takes milliseconds.
SMALL = {"max_groups": 2, "max_tensors": 2, "max_steps": 3}
FEW = {"max_groups": 2, "max_tensors": 2, "max_steps": 2}

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def is_judged_fairly(case, backend):
    """Whether no decay is 0 in fp32 only, which spares a lost parameter, and no maximum forgets a NaN."""
    options = [case.options, *({**case.options, **group.options} for group in case.groups)]
    decays = [each.get("weight_decay", 0) for each in options]
    # The fused operation's maximum of a number and NaN is the number.
    forgets = backend == "native" and any(each.get("amsgrad") and each.get("eps") == 0 for each in options)
    return not forgets and all(decay == 0 or decay > 1e-30 for decay in decays)


@each_backend
@patient
@given(data=st.data(), epsilon_hat=st.booleans())
def test_every_step_is_as_right_as_torchs_fused_one(backend, data, epsilon_hat):
    cases = adam_cases(options=OPTIONS[backend], dtypes=DTYPES, **SMALL)
    case = data.draw(cases.filter(lambda case: is_judged_fairly(case, backend)))
    make = maker(Adam, backend, epsilon_hat=epsilon_hat)
    check_adam(make, case, epsilon_hat=epsilon_hat, device=home(backend))


@patient
@given(adam_cases(options=(*ADAM_OPTIONS, *FLAGS, "clip_value"), dtypes=[torch.float32, torch.float64]))
def test_native_clips_values_as_right(case):
    check_adam(maker(Adam, "native", epsilon_hat=True), case, epsilon_hat=True)


@patient
@given(backend=st.sampled_from(["triton", "eager"]), data=st.data())
def test_states_of_half_precision_parameters_may_be_float32(backend, data):
    half = [torch.bfloat16, torch.float16]
    drawn = adam_cases(options=OPTIONS[backend], dtypes=half, gradient_dtypes=[None, torch.float32], **FEW)
    make = maker(Adam, backend, epsilon_hat=True, state_dtype=torch.float32)
    check_adam(make, data.draw(drawn), epsilon_hat=True, state_dtype=torch.float32, device=home(backend))


@patient
@given(backend=st.sampled_from(BACKENDS), data=st.data())
def test_adamw_decays_parameters_by_default(backend, data):
    case = data.draw(adam_cases(options=["lr", "betas", "eps", "weight_decay"], **FEW))
    defaults = AdamOptions(weight_decay=0.01, decoupled_weight_decay=True)
    check_adam(
        maker(AdamW, backend, epsilon_hat=True), case, epsilon_hat=True, defaults=defaults, device=home(backend)
    )


@patient
@given(backend=st.sampled_from(BACKENDS), data=st.data())
def test_complex_parameters_are_pairs_of_real_ones(backend, data):
    dtypes = [torch.complex64, torch.complex128]
    case = data.draw(adam_cases(dtypes=dtypes, **FEW))
    check_adam(maker(Adam, backend, epsilon_hat=True), case, epsilon_hat=True, device=home(backend))


@patient
@given(adam_cases(options=OPTIONS["native"], dtypes=DTYPES, gradient_dtypes=[None, torch.float32]))
def test_the_backend_that_is_chosen_by_itself_takes_every_case(case):
    check_adam(maker(Adam, None, epsilon_hat=False), case)


@patient
@given(
    adam_cases(
        options=(*ADAM_OPTIONS, "maximize", "decoupled_weight_decay"),
        dtypes=DTYPES,
        layouts=DENSE_LAYOUTS,
        gradient_layouts=["same"],
    )
)
def test_native_is_torchs_fused_adam_bit_by_bit_where_gradients_are_laid_out_as_their_parameters(case):
    ours = _run(maker(Adam, "native", epsilon_hat=False), case)
    assert ours == _run(lambda groups, **options: torch.optim.Adam(groups, fused=True, **options), case)


def _run(make, case):
    fences = [tensor.build() for tensor in case.tensors]
    params = [torch.nn.Parameter(fence.tensor) for fence in fences]
    remaining = iter(params)
    groups = [{"params": [next(remaining) for _ in group.tensors], **group.options} for group in case.groups]
    optimizer = make(groups, **case.options)
    for step in case.steps:
        for param, gradient in zip(params, step.gradients, strict=True):
            param.grad = None if gradient is None else gradient.build(param).tensor
        optimizer.step()
    return everything(optimizer)
