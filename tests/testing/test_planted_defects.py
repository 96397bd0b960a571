"""The kit's own proof: a small right Adam passes, and each defect planted in it is caught."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from dragon.vm.testing import (
    FenceError,
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

OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
CASES = adam_cases(options=OPTIONS, max_groups=2, max_tensors=2, max_steps=3)
SETTINGS = {
    "database": None,
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.generate],  # that a defect is caught is the point, not its smallest example
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
}


class PlainAdam(torch.optim.Optimizer):
    """Adam in plain torch operations; each defect overrides one method."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, **flags):
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {"maximize": False, "decoupled_weight_decay": False, **given, **flags})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.gradient(p, group), self.ready_state(p, group), group)

    def ready_state(self, p, group):
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ()):
                state[name] = torch.zeros_like(p)
        return state

    def gradient(self, p, group):
        return -p.grad if group["maximize"] else p.grad

    def update(self, p, grad, state, group):
        beta1, beta2 = group["betas"]
        state["step"] += 1
        grad = self.decay(p, grad, group)
        state["exp_avg"].copy_(beta1 * state["exp_avg"] + (1 - beta1) * grad)
        state["exp_avg_sq"].copy_(self.second_moment(state["exp_avg_sq"], grad, beta2))
        step = self.correction_step(state)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denom = self.denominator(self.normalizer(state, correction2, group), correction2, group["eps"])
        self.store(p, self.learning_rate(group) / correction1 * (state["exp_avg"] / denom))

    def decay(self, p, grad, group):
        if group["decoupled_weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            return grad
        return grad + group["weight_decay"] * p if group["weight_decay"] else grad

    def second_moment(self, old, grad, beta2):
        return beta2 * old + (1 - beta2) * grad * grad

    def correction_step(self, state):
        return state["step"].item()

    def learning_rate(self, group):
        return group["lr"]

    def normalizer(self, state, correction2, group):
        if not group["amsgrad"]:
            return state["exp_avg_sq"]
        return torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])

    def denominator(self, second, correction2, eps):
        return second.sqrt() / math.sqrt(correction2) + eps

    def store(self, p, change):
        p.sub_(change)


class OneMinusBetaInFloat32(PlainAdam):
    def second_moment(self, old, grad, beta2):
        return beta2 * old + (1 - torch.tensor(beta2)) * grad * grad


class EpsilonBeforeCorrection(PlainAdam):
    def denominator(self, second, correction2, eps):
        return (second.sqrt() + eps) / math.sqrt(correction2)


class EpsilonInsideTheRoot(PlainAdam):
    def denominator(self, second, correction2, eps):
        return (second / correction2 + eps).sqrt()


class BiasCorrectionOffByOne(PlainAdam):
    def correction_step(self, state):
        return state["step"].item() + 1


class CounterInBfloat16(PlainAdam):
    counter_dtype = torch.bfloat16

    def ready_state(self, p, group):
        state = super().ready_state(p, group)
        state["step"] = state["step"].to(self.counter_dtype)
        return state


class CounterInFloat16(CounterInBfloat16):
    counter_dtype = torch.float16


class CounterWrapsInTheCorrection(PlainAdam):
    def correction_step(self, state):
        return max(state["step"].item() % 2**16, 0.5)


class BiasCorrectionInFloat32(PlainAdam):
    def denominator(self, second, correction2, eps):
        return second.sqrt() / (1 - (1 - torch.tensor(correction2))).sqrt() + eps


class DecayDropped(PlainAdam):
    def decay(self, p, grad, group):
        return grad


class DecayAlwaysL2(PlainAdam):
    def decay(self, p, grad, group):
        return grad + group["weight_decay"] * p


class MaximizeIgnored(PlainAdam):
    def gradient(self, p, group):
        return p.grad


class MaskOneShort(PlainAdam):
    def store(self, p, change):
        if p.numel() > 1:
            change[(-1,) * change.dim()] = 0
        p.sub_(change)


class MaskOneLong(PlainAdam):
    def store(self, p, change):
        p.sub_(change)
        last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
        if p.numel():
            p.detach().as_strided((1,), (1,), p.storage_offset() + last + 1).zero_()


class MaskOneEarly(PlainAdam):
    def store(self, p, change):
        p.sub_(change)
        p.detach().as_strided((1,), (1,), p.storage_offset() - 1).zero_()


class StridesForgotten(PlainAdam):
    """Walks the parameter's memory without its gaps."""

    def store(self, p, change):
        torch.as_strided(p.detach(), (p.numel(),), (1,)).sub_(change.reshape(-1))


class OneStepCounterForAll(PlainAdam):
    """Bias corrections by the optimizer's count of steps, state by the parameter's own."""

    def step(self):
        self.calls = getattr(self, "calls", 0) + 1
        super().step()

    def correction_step(self, state):
        return max(self.calls, state["step"].item())


class StepCountsWithoutGradient(PlainAdam):
    def step(self):
        super().step()
        for state in self.state.values():
            state["step"].fill_(max(other["step"].item() for other in self.state.values()))


class MaximumAfterCorrection(PlainAdam):
    def normalizer(self, state, correction2, group):
        if not group["amsgrad"]:
            return state["exp_avg_sq"]
        state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"] / correction2))
        return state["max_exp_avg_sq"] * correction2


class AMSGradIgnored(PlainAdam):
    def normalizer(self, state, correction2, group):
        return state["exp_avg_sq"]


class SecondMomentLostUnderItsMaximum(PlainAdam):
    def normalizer(self, state, correction2, group):
        maximum = super().normalizer(state, correction2, group)
        state["exp_avg_sq"][state["exp_avg_sq"] < 2**-24 * maximum] = 0
        return maximum


class StaleGradient(PlainAdam):
    def gradient(self, p, group):
        self.first = getattr(self, "first", {})
        return self.first.setdefault(p, super().gradient(p, group).clone())


class GradientOverwritten(PlainAdam):
    def gradient(self, p, group):
        p.grad = super().gradient(p, group)
        return p.grad


class StateThroughBfloat16(PlainAdam):
    def second_moment(self, old, grad, beta2):
        return super().second_moment(old, grad, beta2).bfloat16().float()


class StateInBfloat16(PlainAdam):
    def ready_state(self, p, group):
        state = super().ready_state(p, group)
        state["exp_avg"] = state["exp_avg"].bfloat16()
        return state


class LearningRateOfTheFirstStep(PlainAdam):
    def learning_rate(self, group):
        return group.setdefault("baked_lr", group["lr"])


class LoadForgetsTheStep(PlainAdam):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"].zero_()


class DecayWithoutGradient(PlainAdam):
    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(0.5)


class NesterovOfTheBuffer(torch.optim.SGD):
    """Takes the momentum of the gradient, where it is that of the buffer: from the second step they differ."""

    @torch.no_grad()
    def step(self):
        before = {p: p.clone() for group in self.param_groups for p in group["params"]}
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if group["nesterov"] and p.grad is not None:
                    gradient = p.grad + group["weight_decay"] * before[p]
                    difference = gradient - self.state[p]["momentum_buffer"]
                    p.add_(difference, alpha=group["lr"] * (1 - group["momentum"]))


def parity(make: Callable, *, max_examples: int, cases=CASES, check=check_adam, **options) -> None:
    @settings(max_examples=max_examples, **SETTINGS)
    @given(cases)
    def every_step_is_right(case):
        check(make, case, **options)

    every_step_is_right()


def test_an_adam_without_defect_passes():
    parity(PlainAdam, max_examples=100)


def test_an_adam_with_epsilon_hat_passes_as_such():
    parity(EpsilonBeforeCorrection, max_examples=50, epsilon_hat=True)


def test_the_wrong_form_of_epsilon_is_caught_in_both_directions():
    for make, epsilon_hat in ((PlainAdam, True), (EpsilonBeforeCorrection, False)):
        with pytest.raises(ParityError, match=r"param.* eps of its largest addend"):
            parity(make, max_examples=300, epsilon_hat=epsilon_hat)


DEFECTS = {
    OneMinusBetaInFloat32: "param|exp_avg_sq",
    EpsilonInsideTheRoot: "param",
    BiasCorrectionOffByOne: "param",
    CounterInBfloat16: "step went from|step is torch.bfloat16",
    CounterInFloat16: "step went from|step is torch.float16",
    CounterWrapsInTheCorrection: "param",
    BiasCorrectionInFloat32: "param",
    DecayDropped: "param|exp_avg",
    DecayAlwaysL2: "param|exp_avg",
    MaximizeIgnored: "param|exp_avg",
    MaskOneShort: "param",
    OneStepCounterForAll: "param",
    StepCountsWithoutGradient: "step",
    MaximumAfterCorrection: "max_exp_avg_sq",
    AMSGradIgnored: "max_exp_avg_sq",
    StaleGradient: "param|exp_avg",
    GradientOverwritten: "changed its gradient",
    StateThroughBfloat16: "param|exp_avg_sq",
    StateInBfloat16: "exp_avg is torch.bfloat16, expected torch.float32",
    LearningRateOfTheFirstStep: "param",
    LoadForgetsTheStep: "step changed by a save and load",
    DecayWithoutGradient: "param changed without a gradient",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_each_planted_defect_is_caught(defect):
    with pytest.raises(ParityError, match=DEFECTS[defect]):
        parity(defect, max_examples=300)


@pytest.mark.parametrize(
    ("defect", "place"),
    [(MaskOneLong, "past its last"), (MaskOneEarly, "before its first")],
    ids=["MaskOneLong", "MaskOneEarly"],
)
def test_each_write_outside_of_a_parameter_is_caught(defect, place):
    with pytest.raises(FenceError, match=place):
        parity(defect, max_examples=300)


def test_a_write_between_the_elements_of_a_view_is_caught():
    cases = adam_cases(layouts=["non_dense"], max_groups=1, max_tensors=1, max_steps=1)
    with pytest.raises((FenceError, ParityError)):
        parity(StridesForgotten, max_examples=100, cases=cases)


def test_a_wrong_form_of_nesterov_is_caught():
    with pytest.raises(ParityError, match=r"nesterov=True.*: param\["):
        parity(NesterovOfTheBuffer, max_examples=100, cases=sgd_cases(), check=check_sgd)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16])
def test_a_counter_that_cannot_count_a_long_run_is_named(dtype):
    class SmallCounter(PlainAdam):
        def ready_state(self, p, group):
            state = super().ready_state(p, group)
            state["step"] = state["step"].to(dtype)
            return state

    group = GroupCase((TensorCase(seed=1, binade=0, numel=5),), {})
    steps = [StepCase((GradientCase(seed=2, binade=0),), {}, count=count) for count in (None, 70000)]
    with pytest.raises(ParityError, match=f"step 2 of 2: parameter 0: step is {dtype}, which does not hold 70000"):
        check_adam(SmallCounter, OptimizerCase({}, (group,), tuple(steps)))


def test_states_of_other_names_may_have_any_dtype():
    class WithMask(PlainAdam):
        def ready_state(self, p, group):
            state = super().ready_state(p, group)
            state.setdefault("mask", torch.ones(p.shape, dtype=torch.bool))
            return state

    parity(WithMask, max_examples=20)


def test_a_second_moment_that_is_lost_far_below_its_maximum_is_caught():
    group = GroupCase((TensorCase(seed=1, binade=0, numel=5),), {})
    steps = [StepCase((GradientCase(seed=2, binade=binade),), {}) for binade in (20, -20)]
    case = OptimizerCase({"amsgrad": True, "betas": (0.9, 2**-30)}, (group,), tuple(steps))
    check_adam(PlainAdam, case)
    with pytest.raises(ParityError, match=r"step 2 of 2: .*: exp_avg_sq\[\d\] .* is 0\.0, expected"):
        check_adam(SecondMomentLostUnderItsMaximum, case)


def test_torchs_fused_adam_is_caught_where_it_ignores_the_strides_of_gradients():
    def fused(groups, **options):
        return torch.optim.Adam(groups, fused=True, **options)

    cases = adam_cases(layouts=["transposed"], gradient_layouts=["reversed"])
    with pytest.raises(ParityError, match=r"exp_avg|param"):
        parity(fused, max_examples=100, cases=cases)
