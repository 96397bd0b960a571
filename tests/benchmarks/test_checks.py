"""The check before the timing lets right optimizers through, and finds planted defects."""

from typing import Any

import pytest
import torch

from benchmarks.cases import FP32, MIXED, PRECISIONS, Case, Precision
from benchmarks.checks import Expected, check, samples
from benchmarks.contenders import CONTENDERS, Step, foreign
from benchmarks.workload import DECAY, LR, Workload, make_origin
from dragon.vm.measuring.shapes import equal

CPU = torch.device("cpu")
PLAIN = Case("plain", ((3, 5), (1,), (1000,)), n_groups=2)
CHAIN = Case("chain", ((3, 5), (1,), (1000,)), chain=True)
CHANGING = Case("changing", equal(9, 100), n_groups=2, changing=True)
FUSED = CONTENDERS["torch fused"]


def error_of(case: Case, precision: Precision, build) -> float:
    origin = make_origin(case, precision, CPU)
    workload = Workload(origin)
    return check(workload, build(workload), Expected(origin))


def stale_last_element(workload: Workload) -> Step:
    """Forgets the last element of the last tensor."""
    step = FUSED.build(workload)
    param = workload.params[-1].detach().view(-1)

    def forgetful() -> None:
        last = param[-1].clone()
        step()
        param[-1] = last

    return forgetful


def wrong_learning_rate(workload: Workload) -> Step:
    return scheduled([{**group, "lr": 1.01 * group["lr"]} for group in workload.groups])


def one_learning_rate(workload: Workload) -> Step:
    return scheduled([{"params": workload.params, "lr": LR}])


def no_schedule(workload: Workload) -> Step:
    return torch.optim.Adam(workload.groups, fused=True).step


def scheduled(groups: list[dict[str, Any]]) -> Step:
    """A step that changes learning rates by itself, as the workload would."""
    optimizer = torch.optim.Adam(groups, fused=True)

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= DECAY
        optimizer.step()

    return step


def unclipped(workload: Workload) -> Step:
    optimizer = torch.optim.Adam(workload.groups, eps=workload.origin.eps, fused=True)
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]  # unscales, and no more
    return optimizer.step


@pytest.mark.parametrize(
    "case", [PLAIN, CHAIN, CHANGING, Case("amsgrad", equal(3, 100), amsgrad=True)], ids=lambda case: case.name
)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
def test_torch_itself_passes(case: Case, precision: Precision) -> None:
    assert error_of(case, precision, FUSED.build) <= FUSED.tolerance_for(precision)


@pytest.mark.parametrize("precision", [FP32, MIXED], ids=lambda precision: precision.name)
def test_our_backends_pass_with_the_chain_and_without(precision: Precision) -> None:
    for case in (PLAIN, CHAIN):
        ours = CONTENDERS["ours eager"]
        assert error_of(case, precision, ours.build) <= ours.tolerance


@pytest.mark.parametrize(
    ("case", "build"),
    [
        (PLAIN, stale_last_element),
        (PLAIN, wrong_learning_rate),
        (PLAIN, one_learning_rate),
        (PLAIN, no_schedule),
        (PLAIN, lambda workload: lambda: None),
        (PLAIN, foreign(torch.optim.AdamW, fused=True, weight_decay=10.0)),
        (CHAIN, unclipped),
        (CHAIN, lambda workload: torch.optim.Adam(workload.groups, eps=workload.origin.eps).step),
    ],
    ids=[
        "last element",
        "learning rate",
        "one group",
        "no schedule",
        "nothing",
        "weight decay",
        "not clipped",
        "not scaled",
    ],
)
def test_a_planted_defect_is_found(case: Case, build) -> None:
    assert not error_of(case, FP32, build) <= 2 * FUSED.tolerance


def test_nan_is_no_success() -> None:
    def poisoned(workload: Workload) -> Step:
        step = FUSED.build(workload)
        workload.origin.grads[0].fill_(float("nan"))
        return step

    assert not error_of(PLAIN, FP32, poisoned) <= 1e9


@pytest.mark.parametrize("numel", [1, 2, 31, 32, 33, 1000])
def test_samples_hold_the_first_and_the_last_element(numel: int) -> None:
    (taken,) = samples([torch.arange(numel)])
    assert taken[0] == 0
    assert taken[-1] == numel - 1
    assert len(taken) <= 2 * 32 + 2
