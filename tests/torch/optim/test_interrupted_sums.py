"""Sums of gradients that are interrupted, at whatever bytecode, count each gradient once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam

from .support import numbers, parameters
from .test_interrupts import OURS, Interrupt, Tracer, params_of
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
