"""Sums of gradients that are interrupted, at whatever bytecode, count each gradient once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._distributed.unreduced import BufferKey, UnreducedSums

from .interrupts import Interrupt, Tracer
from .support import numbers, parameters
from .test_interrupts import OURS, params_of
from .test_interrupts import undisturbed as undisturbed

SHAPES = ((3,), (2, 2), (17,))


def with_sums() -> Any:
    """An optimizer that has sums of two parameters, with later gradients of the last two."""
    params = parameters(SHAPES)
    optimizer = Adam(params, backend="native")
    for seed, chosen in ((1, params[:2]), (2, params[1:])):
        for param in chosen:
            param.grad = numbers(seed, *param.shape)
        if seed == 1:
            optimizer.sum_grad()
    return optimizer


def gathered(optimizer: Any) -> list[torch.Tensor]:
    """What a step would use of each parameter."""
    found = optimizer._sums.added_to(params_of(optimizer), [param.grad for param in params_of(optimizer)])
    return [torch.zeros(()) if each is None else each.clone() for each in found]


@pytest.mark.parametrize(
    "call",
    [lambda optimizer: optimizer.sum_grad(), lambda optimizer: optimizer._step_supports_amp_scaling],
    ids=["sum_grad", "a scaler looks"],
)
def test_an_interrupt_at_any_bytecode_leaves_each_gradient_once(call: Callable[[Any], Any]) -> None:
    expected = gathered(with_sums())
    optimizer = with_sums()
    counter = Tracer(None, OURS)
    counter.run(partial(call, optimizer))
    assert counter.count > 300
    for at in range(1, counter.count + 1):
        optimizer = with_sums()
        with pytest.raises(Interrupt):
            Tracer(at, OURS).run(partial(call, optimizer))
        assert all(map(torch.equal, gathered(optimizer), expected)), at


def waiting() -> tuple[UnreducedSums, set[int]]:
    """Sums that wait for other processes, with later gradients of two of three; that of the last is zeroed."""
    params = parameters(SHAPES)
    sums = UnreducedSums(BufferKey(None, torch.device("cpu"), torch.float32), params)
    for seed in (1, 2):
        for param in params[seed - 1 :]:
            param.grad = numbers(seed, *param.shape)
        if seed == 1:
            sums.take()
    return sums, {id(params[-1])}


def test_an_interrupt_leaves_each_gradient_that_is_still_to_be_reduced_once() -> None:
    def gathered() -> list[torch.Tensor]:
        return [
            view if param.grad is None else view + param.grad
            for view, param in zip(sums._views, sums.params, strict=True)
        ]

    sums, zeroed = waiting()
    expected = gathered()
    counter = Tracer(None, OURS)
    counter.run(partial(sums.take, zeroed))
    assert [param.grad is None for param in sums.params] == [True, True, False]
    assert counter.count > 50
    for at in range(1, counter.count + 1):
        sums, zeroed = waiting()
        with pytest.raises(Interrupt):
            Tracer(at, OURS).run(partial(sums.take, zeroed))
        assert all(map(torch.equal, gathered(), expected)), at
        sums.take(zeroed)
        assert all(map(torch.equal, gathered(), expected)), at
        assert sums._is_present == [True] * len(SHAPES)
