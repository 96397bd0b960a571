"""Groups that differ in a single option, or in dtype: each is updated as if the other one were not there."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, everything, home, numbers

FP32 = torch.float32

# What both groups have, and what the second one has besides.
ADAM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"lr": 0.2}),
    ({}, {"betas": (0.8, 0.9)}),
    ({"eps": 0.1}, {"eps": 0.2}),
    ({"epsilon_hat": True, "eps": 0.1}, {"eps": 0.2}),
    ({"eps": 0.1}, {"epsilon_hat": True}),
    ({}, {"weight_decay": 0.1}),
    ({"weight_decay": 0.1}, {"decoupled_weight_decay": True}),
    ({}, {"amsgrad": True}),
    ({}, {"ema_decay": 0.5}),
    ({"ema_decay": 0.9}, {"ema_decay": 0.5}),
    ({"amsgrad": True}, {"maximize": True}),
]
SGD_ALONE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"momentum": 0.9}),
    ({"momentum": 0.9}, {"momentum": 0.5}),
    ({"momentum": 0.9}, {"dampening": 0.5}),
    ({"momentum": 0.9, "dampening": 0.5}, {"dampening": 0.25}),
    ({"momentum": 0.9}, {"nesterov": True}),
]
COMMON: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"maximize": True}),
    ({}, {"grad_scale": 2.0}),
    ({"clip_value": 0.1}, {"grad_scale": 2.0}),
    ({}, {"clip_value": 0.1}),
    ({"clip_value": 0.2}, {"clip_value": 0.1}),
    ({}, {"clip_norm": 0.1}),
    # A limit that no gradient reaches switches the other bound off.
    ({"clip_value": 0.1}, {"clip_norm": 1e9}),
]
CASES = [(Adam, *case) for case in ADAM + COMMON] + [(SGD, *case) for case in SGD_ALONE + COMMON]


def stepped(
    kind: Any,
    groups: dict[int, dict[str, Any]],
    backend: str,
    dtypes: Sequence[torch.dtype] = (FP32,) * 3,
) -> list[Any]:
    """Bits of parameters and states after some steps of groups with these options, by their number."""
    params: dict[int, list[torch.Tensor]] = {n: [] for n in groups}
    for i, numel in enumerate((5, 70)):
        for n, own in params.items():
            value = numbers(10 * n + i, numel, dtype=dtypes[n], device=home(backend))
            own.append(torch.nn.Parameter(value))
    made = [{"params": params[n], "lr": 0.1, **options} for n, options in groups.items()]
    optimizer = kind(made, backend=backend)
    for step in range(3):
        for n, own in params.items():
            for i, param in enumerate(own):
                # One parameter misses a step: its count is another.
                is_there = (step, i) != (1, 0)
                param.grad = numbers(100 * step + 10 * n + i, *param.shape).to(param) if is_there else None
        optimizer.step()
    return everything(optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"clip_value": 0.1}, {"grad_scale": 0.5}], ids=str)
@pytest.mark.parametrize("kind", [Adam, SGD])
@pytest.mark.parametrize("dtypes", list(permutations((FP32, torch.bfloat16, torch.float64))), ids=str)
def test_each_dtype_is_updated_as_if_alone(
    dtypes: tuple[torch.dtype, ...], kind: Any, options: dict[str, Any], backend: str
) -> None:
    alone = [found for n in range(3) for found in stepped(kind, {n: options}, backend, dtypes)]
    assert stepped(kind, dict.fromkeys(range(3), options), backend, dtypes) == alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"epsilon_hat": True, "eps": 0.1}, {"max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("are_apart", [False, True])
@pytest.mark.usefixtures("at_once")
def test_a_dtype_without_a_gradient_stays_as_it_is(are_apart: bool, options: dict[str, Any], backend: str) -> None:
    dtypes = (FP32, FP32, torch.float64, torch.float64)
    params = [torch.nn.Parameter(numbers(1, 5, device=home(backend)).to(dtype)) for dtype in dtypes]
    optimizer = Adam(params, backend=backend, **options)
    for step in range(5):
        are_there = [step == 0 or i // 2 == step % 2 for i in range(4)]
        for i, param in enumerate(params):
            param.grad = numbers(10 * step + i, 5).to(param) if are_there[i] else None
        before = everything(optimizer)
        optimizer.step()
        after = everything(optimizer)
        assert [own != other for own, other in zip(after, before, strict=True)] == are_there
        if step == 0 and are_apart:
            # Counters that a user sets lie apart from each other.
            for state in optimizer.state.values():
                state["step"] = state["step"].clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "options", "others"), CASES, ids=str)
def test_each_group_is_updated_by_its_own_options(
    kind: Any, options: dict[str, Any], others: dict[str, Any], backend: str
) -> None:
    both = {0: options, 1: {**options, **others}}
    alone = [found for n, own in both.items() for found in stepped(kind, {n: own}, backend)]
    assert stepped(kind, both, backend) == alone
    # A difference that changes nothing would let any test pass.
    assert stepped(kind, {1: both[1]}, backend) != stepped(kind, {1: options}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", [{"amsgrad": True}, {"ema_decay": 0.5}, {"grad_scale": 2.0}], ids=str)
def test_a_norm_is_of_the_gradients_of_all_groups(others: dict[str, Any], backend: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3, device=home(backend))) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], **others}, {"params": params[2:]}]
    optimizer = Adam(groups, max_grad_norm=0.1, backend=backend)
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, 10.0**i)
    optimizer.step()
    expected = torch.tensor([1.0, 10.0 * others.get("grad_scale", 1.0), 100.0], dtype=torch.float64)
    assert float(optimizer.grad_norm) == pytest.approx(float((3 * expected.square()).sum().sqrt()), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [3, 9000])
def test_gradients_that_a_step_does_not_zero_stay_also_behind_one_that_does(numel: int, backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.complex64, device=home(backend)))
    optimizer = SGD([param], lr=1.0, grad_scale=0.5, backend=backend)
    for step, zero_grad in enumerate((True, False, True, False), 1):
        grad = param.grad = torch.full_like(param, 2.0 + 4.0j)
        optimizer.step(zero_grad=zero_grad)
        assert (grad == (0.0 if zero_grad else 2.0 + 4.0j)).all()
        assert (param == -step * (1.0 + 2.0j)).all()
