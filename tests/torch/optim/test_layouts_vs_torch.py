"""Layouts that PyTorch's fused CPU operation takes for others: what it makes of them, beside what ours makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim import Adam

from .judging import judged_step, place, same_bits, snapshots

SHAPE = (2, 3, 4, 5)
BACKENDS = [None, "native", "eager", "triton"]
Case = Callable[[], tuple[Tensor, Tensor, Tensor]]


def _values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _channels_last_parameter() -> tuple[Tensor, Tensor, Tensor]:
    param = _values(0, *SHAPE).to(memory_format=torch.channels_last)
    return param, _values(1, *SHAPE), param


def _channels_last_gradient() -> tuple[Tensor, Tensor, Tensor]:
    param = _values(0, *SHAPE)
    return param, _values(1, *SHAPE).to(memory_format=torch.channels_last), param


def _transposed_gradient() -> tuple[Tensor, Tensor, Tensor]:
    param = _values(0, 4, 6)
    return param, _values(1, 6, 4).t(), param


def _strided_view() -> tuple[Tensor, Tensor, Tensor]:
    base = _values(0, 5, 7, 2)
    return base[..., 0], _values(1, 5, 7), base


def _narrow_view() -> tuple[Tensor, Tensor, Tensor]:
    base = _values(0, 6, 8)
    return base[1:5, 2:6], _values(1, 4, 4), base


def _expanded_gradient() -> tuple[Tensor, Tensor, Tensor]:
    param = _values(0, 4, 6)
    # With memory behind it, which an operation that takes it for 24 elements would read.
    return param, _values(1, 24)[:4].view(4, 1).expand(4, 6), param


# For each: parameter, gradient, the memory that the parameter lies in; whether PyTorch's fused operation is wrong.
CASES: dict[str, tuple[Case, bool]] = {
    "channels_last parameter, contiguous gradient": (_channels_last_parameter, True),
    "contiguous parameter, channels_last gradient": (_channels_last_gradient, True),
    "transposed gradient": (_transposed_gradient, True),
    "every second element of a buffer": (_strided_view, True),
    "rows and columns of a matrix": (_narrow_view, True),
    "expanded gradient": (_expanded_gradient, True),
}


def outside(param: Tensor, base: Tensor) -> Tensor:
    """Elements of the memory that are not the parameter's."""
    with torch.no_grad():
        mask = torch.ones_like(base, dtype=torch.bool)
        mask.as_strided(param.shape, param.stride(), param.storage_offset()).fill_(False)
    return base[mask].clone()


def steps(make: Any, case: Case, where: torch.device, take: Callable[[Any], None]) -> tuple[Tensor, bool]:
    """The parameter after three steps, and whether its neighbours kept their bits."""
    value, grad, base = case()
    if where.type != "cpu":
        moved = base.to(where)
        value = moved.as_strided(value.shape, value.stride(), value.storage_offset())
        grad, base = torch.empty_strided(grad.shape, grad.stride(), device=where).copy_(grad), moved
    param = torch.nn.Parameter(value)
    before = outside(value, base)
    optimizer = make([param])
    for _ in range(3):
        param.grad = grad
        take(optimizer)
    return param.detach().cpu(), same_bits(outside(value, base), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_ours_is_right_where_pytorchs_fused_operation_is_wrong(
    name: str, backend: str | None, device: torch.device
) -> None:
    case, is_wrong = CASES[name]
    cpu = torch.device("cpu")
    expected, _ = steps(lambda p: torch.optim.Adam(p, 0.1, foreach=False), case, cpu, lambda o: o.step())
    fused, _ = steps(lambda p: torch.optim.Adam(p, 0.1, fused=True), case, cpu, lambda o: o.step())
    ours, kept = steps(
        lambda p: Adam(p, 0.1, epsilon_hat=False, backend=backend), case, place(backend, device), judged_step
    )
    error, fused_error = ((result - expected).abs().max().item() for result in (ours, fused))
    assert error < 1e-5, f"off by {error}; PyTorch's fused operation by {fused_error}"
    assert kept, "neighbours of the view were written"
    assert (fused_error < 0.1) != is_wrong, f"PyTorch's fused operation is off by {fused_error}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_is_negated_where_it_is_read_is_pytorchs(backend: str | None) -> None:
    params = [
        [torch.nn.Parameter(torch._neg_view(_values(0, 5))), torch.nn.Parameter(_values(1, 3))] for _ in "ab"
    ]
    optimizers = Adam(params[0], lr=0.1, backend=backend), torch.optim.Adam(params[1], lr=0.1)
    for number in range(3):
        for chosen, optimizer in zip(params, optimizers, strict=True):
            for param in chosen:
                param.grad = _values(number, *param.shape)
            optimizer.step()
    for ours, theirs in zip(*params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conjugated_gradient_of_a_strided_parameter_is_read_as_what_it_is(backend: str | None) -> None:
    results = []
    for change in (torch.conj, torch.conj_physical):
        param = torch.nn.Parameter(torch.view_as_complex(_values(0, 4, 2, 2))[:, 0])
        optimizer = Adam([param], lr=0.1, backend=backend)
        for number in range(2):
            param.grad = change(torch.view_as_complex(_values(number, 4, 2)))
            optimizer.step()
        results.append(param.detach())
    assert same_bits(*results)


def test_pytorchs_fused_operation_writes_outside_of_a_view_and_ours_does_not() -> None:
    _, kept = steps(
        lambda p: torch.optim.Adam(p, 0.1, fused=True), _narrow_view, torch.device("cpu"), lambda o: o.step()
    )
    assert not kept
    _, kept = steps(lambda p: Adam(p, 0.1), _narrow_view, torch.device("cpu"), lambda o: o.step())
    assert kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_later", [False, True])
def test_a_conjugated_view_is_refused_before_anything_changes(backend: str | None, is_later: bool) -> None:
    """PyTorch's step cannot see it as real numbers, and raises."""
    params = [torch.nn.Parameter(torch.view_as_complex(_values(i, 3, 2))) for i in range(2)]
    if not is_later:
        with pytest.raises(ValueError, match=r"must not be conjugated views: give resolve_conj\(\)"):
            Adam([params[0], torch.nn.Parameter(params[1].detach().conj())], backend=backend)
        return
    optimizer = Adam(params, backend=backend)
    params[1].data = params[1].data.conj()
    for param in params:
        param.grad = torch.ones_like(param)
    before = snapshots(optimizer)
    with pytest.raises(ValueError, match="must not be conjugated views"):
        optimizer.step()
    assert same_bits(snapshots(optimizer), before)
