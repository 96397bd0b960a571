import numpy as np
import pytest
import torch
from torch import Size

from dragon.vm.torch.optim._formats.blockwise import SquareQ8
from dragon.vm.torch.optim._formats.resolve import (
    Storage,
    StorageOptions,
    cannot_forget,
    check_options,
    is_blockwise,
    resolve,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MATRIX, BIAS = Size((64, 64)), Size((64,))
ADAM = ("exp_avg", "exp_avg_sq")
AMSGRAD = (*ADAM, "max_exp_avg_sq")


def storage(
    dtype: torch.dtype, options: StorageOptions, shape: Size = MATRIX, states: tuple[str, ...] = ADAM
) -> Storage:
    check_options(options)
    return resolve(options, dtype, shape, states)


def names(found: Storage) -> tuple[str, ...]:
    return found.param.name, *(form.name for form in found.states.values())


def options(*values: object, **named: object) -> StorageOptions:
    return StorageOptions(*values, **named)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
def test_without_options_everything_has_the_parameters_dtype(dtype: torch.dtype) -> None:
    found = storage(dtype, StorageOptions(), states=AMSGRAD)
    name = str(dtype).removeprefix("torch.")
    assert names(found) == (name,) * 4
    assert found.average == dtype
    assert found.asked == frozenset()


Q8 = ("q8_signed", "q8_square_stochastic")


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [
        (FP32, options(BF16), ("float32", "bfloat16", "bfloat16_stochastic")),
        (BF16, options(BF16), ("bfloat16", "bfloat16", "bfloat16_stochastic")),
        (FP32, options(BF16, False), ("float32", "bfloat16", "bfloat16")),
        (BF16, options(FP32), ("bfloat16", "float32", "float32")),
        (FP64, options(BF16), ("float64", "bfloat16", "bfloat16")),
        (FP32, options({"exp_avg": FP16}), ("float32", "float16", "float32")),
        (FP32, options({"exp_avg_sq": BF16}), ("float32", "float32", "bfloat16_stochastic")),
        (BF16, options(None, True), ("bfloat16_stochastic", "bfloat16", "bfloat16_stochastic")),
        (BF16, options(BF16, True), ("bfloat16_stochastic", "bfloat16", "bfloat16_stochastic")),
        (FP32, options(None, True), ("float32", "float32", "float32")),
        (BF16, options(None, None, FP32), ("bfloat16_master", "float32", "float32")),
        (FP16, options(None, None, FP32), ("float16_master", "float32", "float32")),
        (BF16, options(None, None, "split16"), ("split16", "float32", "float32")),
        (BF16, options(BF16, None, "split16"), ("split16", "bfloat16", "bfloat16_stochastic")),
        (BF16, options("8bit", None, "split8"), ("split8_stochastic", *Q8)),
        (BF16, options("8bit", True, "split8"), ("split8_stochastic", *Q8)),
        (BF16, options("8bit", False, "split8"), ("split8", "q8_signed", "q8_square")),
        (FP32, options("8bit"), ("float32", *Q8)),
        (FP32, options({"exp_avg": "8bit", "exp_avg_sq": BF16}), ("float32", "q8_signed", "bfloat16_stochastic")),
    ],
)
def test_the_formats_of_each_mode(dtype: torch.dtype, asked: StorageOptions, expected: tuple[str, ...]) -> None:
    assert names(storage(dtype, asked)) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (options("8bit"), "bfloat16_upward"),
        (options("8bit", False), "bfloat16_upward"),
        (options(BF16), "bfloat16_upward"),
        (options(BF16, False), "bfloat16"),
        (options({"exp_avg_sq": "8bit", "max_exp_avg_sq": FP32}), "float32"),
        (options({"exp_avg_sq": FP32, "max_exp_avg_sq": BF16}), "bfloat16_upward"),
        (options({"exp_avg": BF16}), "float32"),
    ],
)
def test_a_maximum_is_never_below_the_true_one(asked: StorageOptions, expected: str) -> None:
    assert storage(FP32, asked, states=AMSGRAD).states["max_exp_avg_sq"].name == expected


def test_small_and_odd_tensors_keep_fp32_states() -> None:
    for shape in (BIAS, Size((32, 64)), Size((64, 27, 3)), Size((4096,)), Size(())):
        assert names(storage(FP32, options("8bit"), shape, AMSGRAD)) == ("float32",) * 4
        assert names(storage(BF16, options("8bit"), shape)) == ("bfloat16", "float32", "float32")
    assert [row for row in (768, 896, 1152, 11008, 27, 147, 3420) if is_blockwise(Size((8192, row)))] == [
        *(768, 896, 1152, 11008)
    ]
    assert is_blockwise(Size((64, 16, 2, 2)))


@pytest.mark.parametrize(
    ("asked", "dtype", "average"),
    [
        (options(BF16), FP32, FP32),
        (options(BF16, False), FP32, FP32),
        (options({"exp_avg": FP16}), FP32, FP32),
        (options(FP32), BF16, FP32),
        (options("8bit"), BF16, FP32),
        (options(None, True), BF16, FP32),
        (options(None, None, "split8"), BF16, FP32),
    ],
)
def test_an_average_beside_something_narrow_is_fp32(
    asked: StorageOptions, dtype: torch.dtype, average: torch.dtype
) -> None:
    assert storage(dtype, asked).average == average


def test_what_a_dtype_is_asked_for() -> None:
    assert storage(FP32, options(BF16), states=AMSGRAD).asked == set(AMSGRAD)
    assert storage(FP32, options({"exp_avg": FP32}), states=AMSGRAD).asked == {"exp_avg"}
    assert storage(FP32, options("8bit")).asked == set()


@pytest.mark.parametrize("value", [False, 0, np.bool_(False)], ids=repr)
@pytest.mark.parametrize(
    "more", [{"master_weights": "split8"}, {"state_dtype": "8bit"}, {"state_dtype": BF16}], ids=str
)
def test_nothing_is_stochastic_where_that_is_false(value: object, more: dict[str, object]) -> None:
    found = storage(BF16, options(stochastic_rounding=value, **more), states=AMSGRAD)
    assert not any(form.stochastic for form in found.formats)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (options("4bit"), "state_dtype: expected .* got '4bit'"),
        (options(torch.int32), "state_dtype: expected .* got torch.int32"),
        (options(torch.float8_e4m3fn), "state_dtype: expected .* got torch.float8_e4m3fn"),
        (options({"max_exp_avg_sq": "8bit"}), "no 8-bit form"),
        (options(FP16), "float16 loses second moments"),
        (options({"exp_avg_sq": FP16}), "float16 loses second moments"),
        (options(None, "yes"), "stochastic_rounding: expected a bool or None, got 'yes'"),
        (options(None, None, BF16), "master_weights: expected .* got torch.bfloat16"),
        (options(None, True, "split16"), "stochastic_rounding=True: an fp32 master is not rounded"),
        (options(None, True, FP32), "stochastic_rounding=True: an fp32 master is not rounded"),
    ],
)
def test_options_that_no_parameter_could_have(asked: StorageOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(asked)


@pytest.mark.parametrize(
    ("asked", "dtype", "message"),
    [
        (options(None, True), FP16, "stochastic_rounding=True: .* got torch.float16"),
        (options(None, True), FP64, "stochastic_rounding=True: .* got torch.float64"),
        (options(None, True), torch.complex64, "stochastic_rounding=True: .* got torch.complex64"),
        (options(None, None, "split16"), FP32, "master_weights='split16': expected bfloat16 .* got torch.float32"),
        (options(None, None, "split8"), FP16, "master_weights='split8': expected bfloat16 .* got torch.float16"),
        (options(None, None, FP32), FP32, "master_weights=torch.float32: expected bfloat16 or float16"),
        (options("8bit"), FP64, '"8bit": .* got torch.float64'),
        (options({"exp_avg": "8bit"}), torch.complex64, '"8bit": .* got torch.complex64'),
    ],
)
def test_options_that_do_not_fit_the_parameter(asked: StorageOptions, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage(dtype, asked)


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        (options("8bit"), FP32),
        (options("8bit"), BF16),
        (options(BF16), FP32),
        (options({"exp_avg": BF16}), FP32),
        (options(None, True), BF16),
        (options(None, None, "split16"), BF16),
        (options(None, None, FP32), BF16),
    ],
)
def test_narrow_storage_is_refused_where_autograd_sees_the_update(
    asked: StorageOptions, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match="differentiable=True: autograd cannot see through rounding"):
        resolve(asked, dtype, MATRIX, ADAM, differentiable=True)


@pytest.mark.parametrize("asked", [options(), options(FP32), options(BF16)])
def test_storage_as_wide_as_the_parameter_is_differentiable(asked: StorageOptions) -> None:
    assert names(resolve(asked, BF16, MATRIX, ADAM, differentiable=True))[0] == "bfloat16"


@pytest.mark.parametrize(
    ("asked", "dtype", "nbytes"),
    [
        (options(), FP32, 12),
        (options(BF16), FP32, 8),
        (options("8bit"), FP32, 6.125),
        (options(None, None, FP32), BF16, 14),
        (options(None, None, "split16"), BF16, 12),
        (options(BF16, None, "split16"), BF16, 8),
        (options(BF16, None, "split8"), BF16, 7),
        (options("8bit", None, "split8"), BF16, 5.125),
        (options(FP32, True), BF16, 10),
        (options(BF16, True), BF16, 6),
        (options("8bit", True), BF16, 4.125),
    ],
)
def test_bytes_of_a_parameter(asked: StorageOptions, dtype: torch.dtype, nbytes: float) -> None:
    found = storage(dtype, asked)
    assert found.nbytes(MATRIX.numel()) == nbytes * MATRIX.numel()
    tensors = [
        torch.empty(part.shape(MATRIX), dtype=part.dtype)
        for form in (found.param, *found.states.values())
        for part in form.parts
    ]
    assert sum(tensor.nbytes for tensor in tensors) == found.nbytes(MATRIX.numel())


def test_the_second_moments_that_cannot_forget() -> None:
    assert cannot_forget(storage(BF16, options()), 0.999)
    assert cannot_forget(storage(FP32, options("8bit", False)), 0.999)
    assert not cannot_forget(storage(BF16, options()), 0.995)
    assert not cannot_forget(storage(FP32, options("8bit")), 0.999)
    assert not cannot_forget(storage(FP32, options()), 0.999)


@pytest.mark.parametrize("beta2", [0.9, 0.98, 0.984, 0.985, 0.99, 0.995, 0.996, 0.9965, 0.999])
def test_they_are_those_that_a_decay_leaves_as_they_are(beta2: float) -> None:
    narrow = torch.arange(128, 256).to(BF16)
    assert cannot_forget(storage(BF16, options()), beta2) == bool(
        ((narrow.float() * beta2).to(BF16) == narrow).any()
    )
    codes = torch.arange(255).to(torch.uint8).view(-1, 51)
    # Each block keeps its largest number, and thereby its scale.
    blocks = torch.cat([codes, torch.full((5, 13), 255, dtype=torch.uint8)], 1)
    decayed = SquareQ8(False).decode([blocks, torch.ones(5, 1)])
    decayed[:, :-1] *= beta2
    found, _ = SquareQ8(False).encode(decayed)
    assert cannot_forget(storage(FP32, options("8bit", False)), beta2) == torch.equal(found, blocks)


def test_keys_of_8_bit_states_are_none_that_pytorch_reads() -> None:
    found = storage(BF16, options("8bit", None, "split8"))
    keys = [state + part.suffix for state, form in found.states.items() for part in form.parts]
    assert keys == ["exp_avg_q8", "exp_avg_scale", "exp_avg_sq_q8", "exp_avg_sq_scale"]
    assert [part.suffix for part in found.param.parts] == ["", "_remainder"]
