"""Tensors without a gradient: the kernels leave them, their counters and everything around them alone."""

import pytest
import torch

from dragon.kernels import table
from dragon.kernels.norm import INF_NORM, L2_NORM

from .tables import Row, Tables, place, spec_of

ADAM = {table.LR: 0.1, table.BETA1: 0.5, table.BETA2: 0.9, table.EPS: 1e-8}
NUMELS = (40, 0, 300, 7)


def rows_of(device, offset, dtype=torch.float32):
    def values(i, numel):
        return place(torch.full((numel,), 1.0 + i, dtype=dtype, device=device), offset)

    return [
        Row(values(i, n), values(i, n), (values(0, n), values(1, n)), step=torch.full((), float(i), device=device))
        for i, n in enumerate(NUMELS)
    ]


def tables_of(rows, absent, device):
    """Tables in which some gradients are absent: who reads them or their counters reads nobody's memory."""
    tables = Tables(rows, [ADAM], device=device)
    for i in absent:
        tables.grads[i] = tables.tensors[i, table.STEP.value] = table.ABSENT.value
    return tables


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_tensors_with_a_gradient_take_part(device, offset, zero_grad, found_inf, dtype):
    rows, before, alone = (rows_of(device, offset, dtype) for _ in range(3))
    absent, present = (0, 2), (1, 3)
    tables = tables_of(rows, absent, device)
    tables.found_inf.fill_(found_inf)
    tables.advance()
    tables.update(spec_of("adam", rows[0], zero_grad=zero_grad))
    single = Tables([alone[i] for i in present], [ADAM], device=device)
    single.found_inf.fill_(found_inf)
    single.advance()
    single.update(spec_of("adam", rows[0], zero_grad=zero_grad))
    for i, row in enumerate(rows):
        like = before[i] if i in absent else alone[i]
        for tensor, expected in zip(
            (row.param, row.grad, *row.states, row.step),
            (like.param, like.grad, *like.states, like.step),
            strict=True,
        ):
            assert torch.equal(tensor, expected)
    assert [row.step.item() for row in rows] == ([0, 1, 2, 3] if found_inf else [0, 2, 2, 4])
    assert tables.column(table.ACTIVE) == ([0.0] * 4 if found_inf else [0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("order", [L2_NORM.value, INF_NORM.value])
@pytest.mark.parametrize("offset", [0, 1])
def test_an_absent_gradient_has_the_norm_zero(device, order, offset):
    tables = tables_of(rows_of(device, offset), (0, 2), device)
    tables.hyper[0, table.GRAD_FACTOR.value] = 1.0
    tables.reduce(order)
    assert tables.partials.tolist() == [0.0, 0.0, 7 * 16.0 if order == L2_NORM.value else 4.0]
