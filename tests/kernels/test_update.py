"""Chunks cover every element once, whatever the tensors' sizes and alignments, and set no bit of the result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dragon.kernels import table
from dragon.kernels.config import LaunchConfig
from dragon.vm.testing import Fenced

from .tables import SMALL, Row, Tables, at_same_offset, place, spec_of

# Around the tail of 16 elements and around the borders of chunks of 128.
NUMELS = (0, 1, 15, 16, 17, 31, 32, 112, 113, 127, 128, 129, 143, 144, 145, 255, 256, 257, 0, 384, 400, 0)
ADAM_GROUP = {table.LR: 0.1, table.BETA1: 0.9, table.BETA2: 0.99, table.EPS: 1e-8, table.EPSILON_HAT: 1.0}


def counting_row(numel: int, misalign: int, device: torch.device) -> tuple[Row, list[Fenced]]:
    """A row whose update adds 1 to each element of a fenced tensor of zeros."""
    param, grad = (Fenced((numel,), device=device, misalign=misalign) for _ in range(2))
    param.tensor.zero_()
    grad.tensor.fill_(1)
    return Row(param.tensor, grad.tensor), [param, grad]


def count_visits(numels: list[int], misalign: list[int], chunk: int, device: torch.device) -> None:
    """Assert that an update visits each element of each tensor once, and nothing else."""
    rows, fences = zip(*(counting_row(n, m, device) for n, m in zip(numels, misalign, strict=True)), strict=True)
    tables = Tables(rows, chunk=chunk, device=device).set_scalars()
    tables.update(spec_of("accumulate", rows[0]), LaunchConfig(chunk=chunk))
    for row, (param, grad) in zip(rows, fences, strict=True):
        assert torch.equal(row.param, torch.ones_like(row.param))
        param.check()
        grad.check()


@pytest.mark.parametrize("misalign", [[0], [1], [0, 1, 2, 0, 3, 4]], ids=["aligned", "misaligned", "mixed"])
def test_every_element_is_in_exactly_one_chunk(device: torch.device, misalign: list[int]) -> None:
    cycle = (misalign * len(NUMELS))[: len(NUMELS)]
    count_visits(list(NUMELS), cycle, 128, device)


@given(st.data())
def test_any_mix_of_sizes_and_alignments_is_walked_once(device: torch.device, data: st.DataObject) -> None:
    numels = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    misalign = data.draw(st.lists(st.integers(0, 5), min_size=len(numels), max_size=len(numels)))
    count_visits(numels, misalign, 256, device)


def test_a_chunk_of_an_empty_tensor_touches_nothing(device: torch.device) -> None:
    row, (fence, _) = counting_row(20, 0, device)
    nothing = Row(numel=0)
    loose = Row(place(torch.zeros(0, device=device), 1), place(torch.zeros(0, device=device), 1))
    tables = Tables([nothing, row, loose], chunks=[(0, 0), (1, 0), (2, 0)], device=device).set_scalars()
    tables.update(spec_of("accumulate", row))
    assert torch.equal(row.param, torch.ones_like(row.param))
    fence.check()


def adam_rows(device: torch.device, offsets: tuple[int, ...] = (0, 1, 0)) -> list[Row]:
    """Rows of random tensors at `offsets` from alignment; the same values at each call."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for numel, offset in zip((333, 200, 17), offsets, strict=True):
        param, grad, exp_avg, exp_avg_sq = torch.randn(4, numel, generator=generator)
        tensors = [place(t.to(device), offset) for t in (param, grad, exp_avg, exp_avg_sq.abs())]
        rows.append(Row(*tensors[:2], tuple(tensors[2:]), step=torch.zeros((), device=device)))
    return rows


def updated(rows: list[Row], config: LaunchConfig = SMALL, **tables_arguments: object) -> list[Tensor]:
    """Parameters and states after a step of Adam."""
    tables = Tables(rows, [ADAM_GROUP], chunk=config.chunk, device=rows[0].param.device, **tables_arguments)
    tables.advance()
    tables.update(spec_of("adam", rows[0]), config, n_processors=2)
    return [tensor for row in rows for tensor in (row.param, *row.states)]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(
    "config",
    [
        LaunchConfig(chunk=256),
        LaunchConfig(chunk=1024, n_warps=8),
        LaunchConfig(chunk=128, programs_per_processor=1),
        LaunchConfig(chunk=128, programs_per_processor=100),
        LaunchConfig(chunk=128, eviction="evict_first", n_stages=2),
    ],
    ids=str,
)
def test_no_launch_configuration_changes_a_bit(device: torch.device, config: LaunchConfig) -> None:
    assert_same_bits(updated(adam_rows(device)), updated(adam_rows(device), config))


def test_the_misaligned_path_gives_the_same_bits_as_the_vector_path(device: torch.device) -> None:
    aligned = updated(adam_rows(device, (0, 0, 0)))
    assert_same_bits(aligned, updated(adam_rows(device, (1, 2, 3))))


def test_the_order_of_tensors_and_chunks_changes_no_bit(device: torch.device) -> None:
    forward, backward = adam_rows(device), adam_rows(device)
    chunks = [(0, 2), (1, 0), (2, 0), (0, 0), (1, 1), (0, 1)]
    expected = updated(forward)
    updated(backward[::-1])
    assert_same_bits(expected, [t for row in backward for t in (row.param, *row.states)])
    assert_same_bits(expected, updated(adam_rows(device), chunks=chunks))


@pytest.mark.parametrize("zero_grad", [False, True])
def test_an_inactive_tensor_is_left_alone_and_only_its_gradient_dropped(
    device: torch.device, zero_grad: bool
) -> None:
    rows, untouched = adam_rows(device), adam_rows(device)
    tables = Tables(rows, [ADAM_GROUP], device=device)
    tables.advance()
    for i in range(2):
        tables.scalar_row(i)[table.ACTIVE.value] = 0
    tables.update(spec_of("adam", rows[0], zero_grad=zero_grad))
    for row, before in zip(rows[:2], untouched[:2], strict=True):
        assert_same_bits([row.param, *row.states], [before.param, *before.states])
        assert torch.equal(row.grad, torch.zeros_like(before.grad) if zero_grad else before.grad)
    assert not torch.equal(rows[2].param, untouched[2].param)


def test_dropping_the_gradient_of_an_inactive_tensor_stays_inside_of_it(device: torch.device) -> None:
    fences = [
        Fenced((numel,), device=device, misalign=misalign) for numel, misalign in ((150, 0), (150, 1), (3, 0))
    ]
    rows = []
    for fence in fences:
        fence.tensor.fill_(float("inf"))
        rows.append(Row(place(torch.zeros_like(fence.tensor)), fence.tensor))
    tables = Tables(rows, device=device).set_scalars(ACTIVE=0.0)
    tables.update(spec_of("accumulate", rows[0], zero_grad=True))
    for fence in fences:
        assert not fence.tensor.any()
        fence.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_is_of_the_parameter_as_it_is_stored(device: torch.device, dtype: torch.dtype) -> None:
    param = place(torch.linspace(1, 2, 40, device=device).to(dtype))
    row = Row(param, at_same_offset(param, 2**-12), ema=place(torch.zeros(40, device=device)))
    tables = Tables([row], device=device).set_scalars(ONE_MINUS_EMA_DECAY=0.5)
    tables.update(spec_of("accumulate", row))
    assert torch.equal(row.ema, 0.5 * row.param.float())


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_are_set_to_zero_on_the_way(device: torch.device, offset: int) -> None:
    grad = Fenced((150,), device=device, misalign=offset)
    grad.tensor.fill_(float("nan"))
    row = Row(place(torch.zeros(150, device=device), offset), grad.tensor)
    Tables([row], device=device).set_scalars().update(spec_of("accumulate", row, zero_grad=True))
    assert not grad.tensor.any()
    grad.check()
    assert row.param.isnan().all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 2.0**16])
def test_gradients_stay_behind_divided_by_the_scale_alone(
    device: torch.device, offset: int, dtype: torch.dtype, scale: float
) -> None:
    grad = Fenced((150,), device=device, misalign=offset, dtype=dtype)
    grad.tensor.copy_(torch.linspace(-300, 300, 150))
    wide = torch.promote_types(dtype, torch.float32)
    # By a tensor: on a GPU PyTorch multiplies by the reciprocal of a number.
    left = (grad.tensor.to(wide) / torch.full((1,), scale, device=device, dtype=wide)).to(dtype)
    row = Row(place(torch.zeros(150, device=device, dtype=dtype), offset), grad.tensor)
    tables = Tables([row], device=device).set_scalars(GRAD_SCALE=0.25, CLIP=8.0)
    tables.grad_scale.fill_(scale)
    expected = (grad.tensor.to(wide) * 0.25).clamp(-8, 8).to(dtype)
    tables.update(spec_of("accumulate", row), unscales=True)
    assert torch.equal(row.param, expected)
    assert torch.equal(grad.tensor, left)
    grad.check()


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_are_set_to_zero_where_others_are_divided(device: torch.device, offset: int) -> None:
    grad = place(torch.full((40,), float("nan"), device=device), offset)
    row = Row(place(torch.zeros(40, device=device), offset), grad)
    Tables([row], device=device).set_scalars().update(spec_of("accumulate", row, zero_grad=True), unscales=True)
    assert not grad.any()


def test_an_inactive_tensor_keeps_its_gradient_scaled(device: torch.device) -> None:
    grad = place(torch.full((40,), 8.0, device=device))
    row = Row(place(torch.zeros(40, device=device)), grad)
    tables = Tables([row], device=device).set_scalars(ACTIVE=0.0)
    tables.grad_scale.fill_(4.0)
    tables.update(spec_of("accumulate", row), unscales=True)
    assert (grad == 8).all()
    assert not row.param.any()


def test_gradients_are_scaled_then_clipped_then_decayed(device: torch.device) -> None:
    param = place(torch.tensor([1.0, -1.0, 2.0, float("inf"), 0.0], device=device))
    grad = place(torch.tensor([1.0, -8.0, 8.0, 1.0, float("nan")], device=device))
    row = Row(param, grad)
    Tables([row], device=device).set_scalars(GRAD_SCALE=0.5, CLIP=2.0, L2=0.25, DECAY=0.5).update(
        spec_of("accumulate", row)
    )
    expected = torch.tensor([0.5 + 0.75, -0.5 - 2.25, 1.0 + 2.5, float("inf"), float("nan")], device=device)
    torch.testing.assert_close(row.param, expected, rtol=0, atol=0, equal_nan=True)


# The product with a decay of 0 is computed, and then not selected.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_without_decay_an_infinite_parameter_leaves_its_gradient_finite(device: torch.device) -> None:
    param = place(torch.tensor([float("inf")], device=device))
    momentum = place(torch.zeros(1, device=device))
    row = Row(param, place(torch.ones(1, device=device)), (momentum,))
    tables = Tables([row], device=device)
    tables.set_scalars(STEP_SIZE=0.1, MOMENTUM_DECAY=0.9, MOMENTUM_GAIN=1.0, NESTEROV_FLAG=0.0)
    tables.update(spec_of("sgd", row))
    assert momentum.item() == 1
    assert param.isinf().all()
