"""Graphs of a step that a `GradScaler` leaves unscaling to."""

from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from ..judging import params_of, same_bits
from .test_live import make, new_values


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_replay_leaves_gradients_unscaled_by_the_scale_of_its_moment(graphed: Any, kind: Any) -> None:
    where, capture = graphed
    optimizer = make(where, kind, fused=True)
    optimizer.grad_scale = torch.full((), 4.0, device=where)
    optimizer.found_inf = torch.zeros((), device=where)
    optimizer.step()
    before = [param.grad.clone() for param in params_of(optimizer)]
    replay = capture(optimizer.step)
    assert same_bits([param.grad for param in params_of(optimizer)], before)
    for number, found in ((3, 0.0), (5, 1.0), (7, 0.0)):
        new_values(optimizer, number)
        grads = [param.grad.clone() for param in params_of(optimizer)]
        optimizer.grad_scale.fill_(number)
        optimizer.found_inf.fill_(found)
        replay()
        # By a tensor: PyTorch multiplies with the reciprocal of a number on CUDA.
        expected = grads if found else [grad / optimizer.grad_scale for grad in grads]
        assert same_bits([param.grad for param in params_of(optimizer)], expected)
