"""What a chunk reads from the tables, with the loads of either kind of processor."""

import pytest
import torch
import triton
import triton.language as tl

from dragon.kernels import Spec, table
from dragon.kernels.tile import are_aligned, load_scalars, load_tensors

WARP_SIZES = [32, 64]


@triton.jit
def alignment_kernel(tensors_ptr, grads_ptr, result_ptr, SPEC: tl.constexpr, WARP_SIZE: tl.constexpr):
    numel, tensors, source = load_tensors(tensors_ptr, grads_ptr, tl.program_id(0).to(tl.int64), WARP_SIZE)
    tl.store(result_ptr + 2 * tl.program_id(0), numel)
    tl.store(result_ptr + 2 * tl.program_id(0) + 1, are_aligned(tensors, source, SPEC).to(tl.int64))


@triton.jit
def scalars_kernel(scalars_ptr, result_ptr, SPEC: tl.constexpr, WARP_SIZE: tl.constexpr):
    scalars = load_scalars(scalars_ptr, tl.program_id(0).to(tl.int64), SPEC, WARP_SIZE)
    for column in tl.static_range(table.SCALAR_COLUMNS):
        tl.store(result_ptr + tl.program_id(0) * table.SCALAR_COLUMNS + column, scalars[column])


@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize("n_states", [0, 1, 2, 3])
@pytest.mark.parametrize("average", [None, "float32"])
def test_one_misaligned_tensor_that_is_walked_makes_a_row_misaligned(device, warp_size, n_states, average):
    columns = ["GRAD", "PARAM", "STATE_0", "STATE_1", "STATE_2", "EMA"]
    walked = [*columns[: 2 + n_states], *(["EMA"] if average else [])]
    names = [None, *columns]
    tensors = torch.zeros(len(names), table.TENSOR_COLUMNS.value, dtype=torch.int64, device=device)
    grads = torch.full((len(names),), 2**40, dtype=torch.int64, device=device)
    tensors[:, table.PARAM.value] = 2**50 + 16
    tensors[:, table.NUMEL.value] = 1 + torch.arange(len(names), device=device)
    for row, name in enumerate(names):
        if name == "GRAD":
            grads[row] += 8
        elif name is not None:
            tensors[row, getattr(table, name).value] += 4
    result = torch.full((len(names), 2), -1, dtype=torch.int64, device=device)
    spec = Spec("adam", "float32", "float32", ("float32",) * n_states, average)
    alignment_kernel[(len(names),)](tensors, grads, result, spec, warp_size)
    assert result.tolist() == [[1 + row, int(name not in walked)] for row, name in enumerate(names)]


@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize(
    ("column", "offset", "is_aligned"),
    [("PARAM_REST", 8, False), ("PARAM_REST", 16, True), ("INDEX_BASE", 4, False), ("INDEX_BASE", 8, True)],
)
def test_a_second_part_and_the_first_random_word_count_too(device, warp_size, column, offset, is_aligned):
    tensors = torch.zeros(1, table.TENSOR_COLUMNS.value, dtype=torch.int64, device=device)
    grads = torch.zeros(1, dtype=torch.int64, device=device)
    tensors[0, getattr(table, column).value] = offset
    result = torch.full((1, 2), -1, dtype=torch.int64, device=device)
    spec = Spec("adam", "split16", "bfloat16", ("bfloat16_stochastic",) * 2)
    alignment_kernel[(1,)](tensors, grads, result, spec, warp_size)
    assert result.tolist() == [[0, int(is_aligned)]]


@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scalar_is_found_in_its_column(device, warp_size, dtype):
    n_columns = table.SCALAR_COLUMNS.value
    scalars = torch.full((3, n_columns), float("nan"), dtype=torch.float64, device=device)
    expected = torch.randn(3, n_columns, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)
    scalars.view(dtype)[:, :n_columns] = expected
    result = torch.empty_like(expected)
    name = str(dtype).removeprefix("torch.")
    scalars_kernel[(3,)](scalars, result, Spec("sgd", name, name), warp_size)
    assert torch.equal(result, expected)
