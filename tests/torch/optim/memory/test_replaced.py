"""Parameters with masters that somebody replaces by others, or whose contents somebody swaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam
from tests.torch.optim.memory.modes import BF16, FP32

BACKENDS = ["eager", "native"]
MASTERS = ["split16", "split8", FP32]


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_master_stays_with_its_state_where_the_parameter_is_replaced(backend: str, master: Any) -> None:
    """Python gives the id of a parameter that is gone to a later one: it has not been written to."""
    made = []
    for replaces in (False, True):
        start = torch.nn.Parameter(torch.ones(8, dtype=BF16))
        optimizer = Adam([start], lr=1e-4, backend=backend, master_weights=master)
        del start
        (group,) = optimizer.param_groups
        ids = set()
        for _ in range(20):
            old = group["params"][0]
            ids.add(id(old))
            old.grad = torch.ones_like(old)
            optimizer.step()
            if replaces:
                new = torch.nn.Parameter(old.detach().clone())
                optimizer.state[new] = optimizer.state.pop(old)
                group["params"] = [new]
                del new
            del old
        assert len(ids) < 20
        made += [value for _, value in optimizer.master_weights()]
    assert torch.equal(*made)
    assert float(made[0][0]) == pytest.approx(1 - 20e-4, abs=1e-4)


@pytest.mark.parametrize("master", MASTERS)
def test_masters_stay_with_their_states_where_all_parameters_are_replaced(master: Any) -> None:
    """As by densification and pruning: a new one may have the id of the one that was replaced before it."""
    made = []
    for replaces in (False, True):
        optimizer = Adam(
            [torch.nn.Parameter(torch.ones(8, dtype=BF16)) for _ in range(6)], lr=1e-4, master_weights=master
        )
        (group,) = optimizer.param_groups
        ids = {id(param) for param in group["params"]}
        for step in range(20):
            for param in group["params"]:
                param.grad = torch.ones_like(param)
            del param
            optimizer.step()
            for index in range(6 if replaces and step % 2 else 0):
                new = torch.nn.Parameter(group["params"][index].detach().clone())
                optimizer.state[new] = optimizer.state.pop(group["params"][index])
                group["params"][index] = new
                ids.add(id(new))
                del new
        assert len(ids) < 6 + 10 * 6
        made.append([value for _, value in optimizer.master_weights()])
    for ours, expected in zip(*made, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_contents_that_are_swapped_in_are_rounded_from_no_other_master(backend: str, master: Any) -> None:
    param = torch.nn.Parameter(torch.ones(8, dtype=BF16))
    optimizer = Adam([param], lr=1e-4, backend=backend, master_weights=master)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    param.grad = None
    other = torch.nn.Parameter(torch.full_like(param, 3))
    assert other._version < param._version
    torch.utils.swap_tensors(param, other)
    for step in range(2):
        ((_, value),) = optimizer.master_weights()
        assert float((value - 3).abs().max()) < 2.0**-8 + step * 1e-4
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert (param == 3).all()
