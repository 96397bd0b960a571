import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import dragon.vm.testing as kit
from dragon.vm.testing import (
    ADAM_OPTIONS,
    DENSE_LAYOUTS,
    SGD_OPTIONS,
    AdamOptions,
    GradientCase,
    GroupCase,
    OptimizerCase,
    ParityError,
    StepCase,
    TensorCase,
    adam_cases,
    check_adam,
    check_sgd,
    sgd_cases,
)
from dragon.vm.torch.optim import SGD, Adam

ALL_OPTIONS = (*ADAM_OPTIONS, "maximize", "decoupled_weight_decay")
# What the fused CPU operations can do: they ignore strides.
FUSED_CASES = {"layouts": DENSE_LAYOUTS, "gradient_layouts": ["same"]}
few = settings(
    max_examples=2 * settings().max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def adam(**flags):
    return lambda groups, **options: torch.optim.Adam(groups, **options, **flags)


@few
@given(adam_cases(options=ALL_OPTIONS))
def test_torchs_for_loop_adam_passes(case):
    check_adam(adam(foreach=False), case)


@pytest.mark.parametrize("told", [{"epsilon_hat": True}, {"defaults": AdamOptions(epsilon_hat=True)}], ids=str)
def test_either_argument_tells_the_form_of_epsilon(told):
    case = one_step({"eps": 0.5})
    check_adam(lambda groups, **options: Adam(groups, epsilon_hat=True, **options), case, **told)
    with pytest.raises(ParityError):
        check_adam(adam(), case, **told)


@few
@given(adam_cases(options=ALL_OPTIONS))
def test_torchs_foreach_adam_passes(case):
    check_adam(adam(foreach=True), case)


@few
@given(adam_cases(options=ALL_OPTIONS, dtypes=[torch.float32, torch.bfloat16, torch.float16], **FUSED_CASES))
def test_torchs_fused_adam_passes(case):
    check_adam(adam(fused=True), case)


@few
@given(adam_cases(options=ALL_OPTIONS, dtypes=[torch.float64]))
def test_torchs_adam_passes_in_float64(case):
    check_adam(adam(foreach=False), case)


@few
@given(adam_cases(dtypes=[torch.complex64]))
def test_torchs_adam_passes_in_complex_numbers(case):
    # The for-loop decays complex numbers as such: of one that is infinite in one part it makes NaN in the other.
    check_adam(adam(foreach=True), case)


@few
@given(adam_cases(dtypes=[torch.bfloat16]))
def test_torchs_for_loop_adam_passes_in_bfloat16_as_bfloat16_arithmetic(case):
    check_adam(adam(foreach=False), case, compute_dtype=torch.bfloat16)


@few
@given(adam_cases())
def test_torchs_adamw_passes_with_its_own_defaults(case):
    check_adam(torch.optim.AdamW, case, defaults=AdamOptions(weight_decay=0.01, decoupled_weight_decay=True))


@few
@given(sgd_cases(options=(*SGD_OPTIONS, "maximize")))
def test_torchs_sgd_passes(case):
    check_sgd(lambda groups, **options: torch.optim.SGD(groups, foreach=False, **options), case)


def one_step(options: dict, lr: dict[int, float] | None = None, **tensor) -> OptimizerCase:
    group = GroupCase((TensorCase(seed=1, binade=0, numel=5, **tensor),), {})
    return OptimizerCase(options, (group,), (StepCase((GradientCase(seed=2, binade=0),), lr or {}),))


def test_an_sgd_without_its_momentum_is_caught():
    def make(groups, momentum, **options):
        return torch.optim.SGD(groups, **options)

    step = one_step({"lr": 0.1, "momentum": 0.9})
    with pytest.raises(ParityError, match=r"step 1 of 1: parameter 0.*momentum_buffer is missing"):
        check_sgd(make, step)


def test_an_lr_set_in_the_optimizer_but_not_in_the_case_is_caught():
    def make(groups, **options):
        return torch.optim.Adam(groups, lr=0.5)

    with pytest.raises(ParityError, match="param"):
        check_adam(make, one_step({"lr": 0.1}))


def test_a_new_lr_counts_from_its_step_on():
    check_adam(adam(), one_step({"lr": 0.1}, lr={0: 0.2}))


class KeepsNoCount(torch.optim.Adam):
    def step(self):
        super().step()
        for state in self.state.values():
            del state["step"]


def test_an_optimizer_that_keeps_other_states_is_told_which_are_missing():
    def make(groups, **options):
        return torch.optim.Adagrad(groups)

    with pytest.raises(ParityError, match="no exp_avg, exp_avg_sq in the state, which has step, sum"):
        check_adam(make, one_step({}))
    with pytest.raises(ParityError, match="no step in the state, which has exp_avg, exp_avg_sq"):
        check_adam(KeepsNoCount, one_step({}))


def test_a_parameter_in_other_memory_is_refused():
    with pytest.raises(ValueError, match="must keep the memory"):
        check_adam(adam(), one_step({}), make_parameter=lambda values: torch.nn.Parameter(values.clone()))


class MovesParameters(torch.optim.Adam):
    def step(self):
        super().step()
        for param in self.param_groups[0]["params"]:
            param.data = param.data.clone()


class MovesGradients(torch.optim.Adam):
    def step(self):
        super().step()
        for param in self.param_groups[0]["params"]:
            param.grad = param.grad.clone()


class MovesParametersAtFirst(torch.optim.Adam):
    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        for param in self.param_groups[0]["params"]:
            param.data = param.data.clone()


class ChangesParametersAtFirst(torch.optim.Adam):
    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self.param_groups[0]["params"][1].detach()[-1] = 0


class MakesGradients(torch.optim.Adam):
    def step(self):
        super().step()
        for param in self.param_groups[0]["params"]:
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ChangesParametersAtFirst, "^parameter 1 was changed by the constructor"),
        (MakesGradients, r"^step 1 of 1: parameter 1: step\(\) changed its gradient"),
    ],
)
def test_what_an_optimizer_does_beside_its_updates_is_caught(make, message):
    group = GroupCase((TensorCase(seed=1, binade=0, numel=5),) * 2, {})
    case = OptimizerCase({}, (group,), (StepCase((GradientCase(seed=2, binade=0), None), {}),))
    check_adam(torch.optim.Adam, case)
    with pytest.raises(ParityError, match=message):
        check_adam(make, case)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (MovesParameters, "parameter 0"),
        (MovesGradients, "gradient of parameter 0"),
        (MovesParametersAtFirst, "parameter 0"),
    ],
)
def test_an_optimizer_that_moves_parameters_or_gradients_must_say_so(make, name):
    with pytest.raises(ParityError, match=f"^step 1 of 1: {name} lies in other memory after the step"):
        check_adam(make, one_step({}))
    check_adam(make, one_step({}), may_move=True)


def test_moved_gradients_of_no_elements_share_no_memory_with_states():
    group = GroupCase((TensorCase(seed=1, binade=0, numel=0),), {})
    case = OptimizerCase({}, (group,), (StepCase((GradientCase(seed=2, binade=0),), {}),))
    check_adam(MovesGradients, case, may_move=True)


@few
@given(adam_cases(options=ALL_OPTIONS))
def test_an_adam_with_flat_buffers_passes_where_it_may_move(case):
    check_adam(lambda groups, **options: Adam(groups, flatten=True, **options), case, may_move=True)


def test_an_sgd_with_flat_buffers_passes_where_it_may_move():
    def make(groups, **options):
        return SGD(groups, flatten=True, **options)

    group = GroupCase((TensorCase(seed=1, binade=0, numel=5),) * 2, {})
    case = OptimizerCase({"lr": 0.1}, (group,), (StepCase((GradientCase(seed=2, binade=0),) * 2, {}),))
    with pytest.raises(ParityError, match="parameter 0 lies in other memory"):
        check_sgd(make, case)
    check_sgd(make, case, may_move=True)


class BufferIsTheGradient(torch.optim.SGD):
    def step(self):
        super().step()
        for p, state in self.state.items():
            state["momentum_buffer"] = p.grad


def test_a_state_in_the_memory_of_a_gradient_is_caught():
    with pytest.raises(ParityError, match="parameter 0: momentum_buffer lies in the memory of its gradient"):
        check_sgd(BufferIsTheGradient, one_step({"momentum": 0.9}))


def test_states_of_a_dtype_of_their_own_are_checked_against_it():
    with pytest.raises(ParityError, match=r"exp_avg is torch.bfloat16, expected torch.float32"):
        check_adam(adam(), one_step({}, dtype=torch.bfloat16), state_dtype=torch.float32)


def test_the_kit_imports_torch_numpy_and_hypothesis_only():
    allowed = {"torch", "numpy", "hypothesis"} | set(sys.stdlib_module_names)
    sources = list(Path(kit.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{source.name} imports from outside of the kit"
                names = [node.module] if node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= allowed, source.name


class FlatWhenLoaded(torch.optim.Adam):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].flatten()


def test_a_state_that_a_load_gives_another_shape_is_caught():
    case = one_step({}, layout="transposed")
    case = replace(case, steps=(*case.steps, StepCase((None,), {}, reload=True)))
    with pytest.raises(ParityError, match="exp_avg changed by a save and load"):
        check_adam(FlatWhenLoaded, case)
