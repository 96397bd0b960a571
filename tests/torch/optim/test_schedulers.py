import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

from dragon.vm.torch.optim import Adam

from .judging import judged_step, make_params, params_of, same_bits, set_grads

MAKERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, 1.0, 4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-1, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-1, total_steps=12),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, swa_lr=0.5, anneal_epochs=4),
}
BASES = {"LRScheduler", "_LRScheduler"}


def groups() -> list[dict[str, Any]]:
    params = make_params()
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]


def numbers(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [(float(group["lr"]), *map(float, group["betas"])) for group in optimizer.param_groups]


def drive(optimizer: torch.optim.Optimizer, name: str, judge: bool) -> list[Any]:
    """Twelve steps; the hyperparameters at each."""
    scheduler = MAKERS[name](optimizer)
    seen = []
    for number in range(11):
        set_grads(params_of(optimizer), number)
        if judge and number % 4 == 1:
            judged_step(optimizer)
        else:
            optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        seen.append(numbers(optimizer))
    return seen


def test_the_list_of_schedulers_is_complete() -> None:
    known = {
        name
        for name, value in vars(schedulers).items()
        if isinstance(value, type) and issubclass(value, schedulers.LRScheduler)
    }
    assert known - BASES <= set(MAKERS)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_each_scheduler_drives_ours_as_it_drives_pytorchs(name: str, as_tensor: bool) -> None:
    seen = []
    for make in (lambda g, lr: Adam(g, lr, epsilon_hat=False), torch.optim.Adam):
        seen.append(
            drive(make(groups(), torch.tensor(0.1) if as_tensor else 0.1), name, make is not torch.optim.Adam)
        )
    assert seen[0] == seen[1]
    assert any(entry != seen[0][0] for entry in seen[0])


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_cycling_the_momentum_writes_betas(name: str) -> None:
    seen = drive(Adam(groups(), 0.1, epsilon_hat=False), name, True)
    assert len({betas for step in seen for _, *betas_ in step for betas in [tuple(betas_)]}) > 2


def test_the_kernel_sees_every_change_of_a_scheduler(device: torch.device) -> None:
    optimizer = Adam(make_params(device=device), 0.1, epsilon_hat=False, backend="triton")
    scheduler = schedulers.OneCycleLR(optimizer, 0.1, total_steps=6)
    for number in range(3):
        set_grads(params_of(optimizer), number)
        judged_step(optimizer)
        scheduler.step()


def test_a_scheduler_writes_into_the_tensor_that_the_user_holds_and_into_no_other_group() -> None:
    lr = torch.tensor([0.1])
    params = make_params()
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:]}], lr, epsilon_hat=False)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    schedulers.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.25, lambda _: 1.0])
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.025, 0.1])
    assert lr.item() == pytest.approx(0.05)
    set_grads(params_of(optimizer), 0)
    judged_step(optimizer)
    lr.fill_(0.0)
    set_grads(params_of(optimizer), 1)
    before = params[0].detach().clone()
    judged_step(optimizer)
    assert same_bits(params[0].detach(), before)


def test_a_scheduler_is_resumed_with_its_optimizer() -> None:
    full, half = Adam(groups(), 0.1), Adam(groups(), 0.1)
    first = MAKERS["OneCycleLR"](full)
    second = MAKERS["OneCycleLR"](half)
    for optimizer, scheduler in ((full, first), (half, second)):
        for number in range(4):
            set_grads(params_of(optimizer), number)
            optimizer.step()
            scheduler.step()
    resumed = Adam(groups(), 0.1)
    for new, old in zip(params_of(resumed), params_of(half), strict=True):
        new.data.copy_(old)
    third = MAKERS["OneCycleLR"](resumed)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    third.load_state_dict(second.state_dict())
    for optimizer, scheduler in ((full, first), (resumed, third)):
        for number in range(4, 7):
            set_grads(params_of(optimizer), number)
            optimizer.step()
            scheduler.step()
    assert same_bits(full.state_dict(), resumed.state_dict())


def test_a_model_is_averaged_over_our_steps() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Adam(model.parameters(), 0.1)
    averaged = AveragedModel(model)
    seen = []
    for _ in range(3):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(seen).mean(0))
