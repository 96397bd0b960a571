"""The formats on tiles against the formats of the host, bit for bit."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dragon.kernels import blockwise, rounding
from dragon.vm.torch.optim._formats.bits import bits_of, square_root, upper_half
from dragon.vm.torch.optim._formats.blockwise import SignedQ8, SquareQ8
from dragon.vm.torch.optim._formats.bound import clamp_moment, moment_bound, rounded_bound
from dragon.vm.torch.optim._formats.philox import Rounding, random_words
from dragon.vm.torch.optim._formats.rounding import StochasticBfloat16, UpwardBfloat16
from dragon.vm.torch.optim._formats.split import Split8, Split16

N = 1024


@triton.jit
def rounding_kernel(
    value_ptr,  # fp32 [N]
    words_ptr,  # int32 [N]
    stochastic_ptr,  # bf16 [N], and so on
    upward_ptr,
    nearest_ptr,
    half_16_ptr,
    remainder_16_ptr,  # int16 [N]
    half_8_ptr,
    remainder_8_ptr,  # int8 [N]
    master_ptr,  # fp32 [5 N]: of 16 bits, of 8 bits, a widened bf16, and of any two parts
    N: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    i = tl.arange(0, N)
    value = tl.load(value_ptr + i)
    words = tl.load(words_ptr + i)
    # Arithmetic makes every NaN a quiet one, as an update does.
    tl.store(stochastic_ptr + i, rounding.stochastic_bfloat16(value * 1.0, words))
    tl.store(upward_ptr + i, rounding.upward_bfloat16(value))
    nearest = rounding.nearest_bfloat16(value)
    tl.store(nearest_ptr + i, nearest)
    half, remainder = rounding.split_16(value)
    tl.store(half_16_ptr + i, half)
    tl.store(remainder_16_ptr + i, remainder)
    tl.store(master_ptr + i, rounding.join_16(half, remainder))
    half, remainder = rounding.split_8(value, words, STOCHASTIC)
    tl.store(half_8_ptr + i, half)
    tl.store(remainder_8_ptr + i, remainder)
    tl.store(master_ptr + N + i, rounding.join_8(half, remainder))
    tl.store(master_ptr + 2 * N + i, rounding.wide_bfloat16(nearest))
    half = rounding.upper_half(rounding.bits_of(value))
    tl.store(master_ptr + 3 * N + i, rounding.join_16(half, words.to(tl.int16)))
    tl.store(master_ptr + 4 * N + i, rounding.join_8(half, words.to(tl.int8)))


@triton.jit
def blockwise_kernel(
    exp_avg_ptr,  # fp32 [N]
    exp_avg_sq_ptr,  # fp32 [N]
    words_ptr,  # int32 [N]
    signed_ptr,  # int8 [N]
    signed_scale_ptr,  # fp32 [N // 64]
    square_ptr,  # uint8 [N]
    square_scale_ptr,  # fp32 [N // 64]
    decoded_ptr,  # fp32 [3 N]: both moments, and the first one clamped
    N: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BOUND: tl.constexpr,
):
    i = tl.arange(0, N)
    j = tl.arange(0, N // 64)
    exp_avg = tl.load(exp_avg_ptr + i)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + i)
    root = tl.sqrt_rn(exp_avg_sq)
    tl.store(decoded_ptr + 2 * N + i, rounding.clamp_moment(exp_avg, root, BOUND))
    codes, scale = blockwise.encode_signed(exp_avg)
    tl.store(signed_ptr + i, codes)
    tl.store(signed_scale_ptr + j, scale)
    tl.store(decoded_ptr + i, blockwise.decode_signed(codes, scale))
    codes, scale = blockwise.encode_square(exp_avg_sq, root, tl.load(words_ptr + i), STOCHASTIC)
    tl.store(square_ptr + i, codes)
    tl.store(square_scale_ptr + j, scale)
    tl.store(decoded_ptr + N + i, blockwise.decode_square(codes, scale))


@triton.jit
def words_kernel(
    origin_ptr,  # int64 [4]: first element, seed, step, stream
    shared_ptr,  # int32 [2, N]
    each_ptr,  # int32 [2, N]
    N: tl.constexpr,
):
    i = tl.arange(0, N)
    first = tl.load(origin_ptr)
    seed = tl.load(origin_ptr + 1)
    step = tl.load(origin_ptr + 2)
    stream = tl.load(origin_ptr + 3)
    words, others = rounding.random_words(first, seed, step, stream, N)
    tl.store(shared_ptr + i, words)
    tl.store(shared_ptr + N + i, others)
    words, others = rounding.random_words_each(first + i, seed, step, stream)
    tl.store(each_ptr + i, words)
    tl.store(each_ptr + N + i, others)


@triton.jit
def words_each_kernel(
    origin_ptr,  # int64 [4]: first element, seed, step, stream
    each_ptr,  # int32 [2, N]
    N: tl.constexpr,
):
    i = tl.arange(0, N)
    index = tl.load(origin_ptr) + i
    words, others = rounding.random_words_each(
        index, tl.load(origin_ptr + 1), tl.load(origin_ptr + 2), tl.load(origin_ptr + 3)
    )
    tl.store(each_ptr + i, words)
    tl.store(each_ptr + N + i, others)


@triton.jit
def bound_kernel(
    inputs_ptr,  # fp64 [3, N]: beta1, beta2, step
    bound_ptr,  # fp32 [N]
    N: tl.constexpr,
):
    i = tl.arange(0, N)
    bound = rounding.moment_bound(
        tl.load(inputs_ptr + i), tl.load(inputs_ptr + N + i), tl.load(inputs_ptr + 2 * N + i)
    )
    tl.store(bound_ptr + i, bound.to(tl.float32))


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor; every NaN has the same ones."""
    tensor = tensor.cpu()
    if not tensor.is_floating_point():
        return tensor
    integer = tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).to(torch.int64)
    return torch.where(tensor.isnan(), 2**40, integer)


def random_patterns(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**31), 2**31, (N,), generator=draw)
    pattern[::7] &= -256
    pattern[1::7] &= -65536
    pattern[2::7] = pattern[2::7] & -65536 | 0x8000
    special = [
        0,
        -(2**31),
        0x7F800000,
        -0x800000,
        0x7F7FFFFF,
        0x7F7F8000,
        0x7F7FFF80,
        0x7F7EFFFF,
        0x7F7FFEFF,
        0x7FFFFFFF,
        -1,
        0x7F800001,
        1,
    ]
    pattern[: len(special)] = torch.tensor(special)
    # Arithmetic, of which updates are made, makes every NaN a quiet one.
    pattern = torch.where(pattern.to(torch.int32).view(torch.float32).isnan(), pattern | 0x400000, pattern)
    return pattern.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("stochastic", [False, True])
def test_rounding_of_any_bits_is_that_of_the_host(device: torch.device, stochastic: bool) -> None:
    split8 = Split8(stochastic)
    for seed in range(64):
        value = random_patterns(seed)
        words = torch.randint(0, 65536, (N,), dtype=torch.int32)
        halves = [torch.empty(N, dtype=torch.bfloat16, device=device) for _ in range(5)]
        remainders = [torch.empty(N, dtype=dtype, device=device) for dtype in (torch.int16, torch.int8)]
        masters = torch.empty(5, N, device=device)
        stochastically, upward, nearest, half_16, half_8 = halves
        with np.errstate(invalid="ignore"):  # of the interpreter, for a NaN
            rounding_kernel[(1,)](
                value.to(device), words.to(device), stochastically, upward, nearest, half_16, remainders[0],
                half_8, remainders[1], masters, N, stochastic, enable_fp_fusion=False,
            )  # fmt: skip
        of_16, of_8 = Split16().encode(value), split8.encode(value, words)
        rounded = [*StochasticBfloat16().encode(value, words), *UpwardBfloat16().encode(value), value.bfloat16()]
        for name, got, wanted in zip(
            ("stochastic", "upward", "nearest", "half of 16", "half of 8", "remainder of 16", "remainder of 8"),
            [*halves, *remainders],
            [*rounded, of_16[0], of_8[0], of_16[1], of_8[1]],
            strict=True,
        ):
            assert torch.equal(bits(got), bits(wanted)), name
        assert torch.equal(bits(masters[0]), bits(Split16().decode(of_16)))
        assert torch.equal(bits(masters[1]), bits(split8.decode(of_8)))
        assert torch.equal(bits(masters[2]), bits(value.bfloat16().float()))
        # Somebody may write to a weight while its remainder stays: below 0 there is no master.
        half = upper_half(bits_of(value))
        assert torch.equal(bits(masters[3]), bits(Split16().decode((half, words.to(torch.int16)))))
        assert torch.equal(bits(masters[4]), bits(split8.decode((half, words.to(torch.int8)))))


def moments(seed: int) -> tuple[Tensor, Tensor]:
    """Blocks far apart in scale, with zeros, and one each with NaN, infinity and the smallest peak that counts."""
    draw = torch.Generator().manual_seed(seed)
    scale = 2 ** (torch.rand(N // 64, 1, generator=draw) * 260 - 150)
    spread = 2 ** -(torch.rand(N // 64, 64, generator=draw) * 25)
    exp_avg = scale * torch.randn(N // 64, 64, generator=draw) * spread
    exp_avg[torch.rand(exp_avg.shape, generator=draw) < 0.1] = 0
    exp_avg[3] = 0
    exp_avg_sq = (exp_avg.square() * 3).clamp(max=3e38)
    exp_avg[5, 7], exp_avg[6, 0], exp_avg_sq[7, 63], exp_avg_sq[8, 1] = torch.nan, -torch.inf, torch.inf, torch.nan
    exp_avg[9] = exp_avg[9].sign() * 2.0**-126
    return exp_avg.reshape(-1), exp_avg_sq.reshape(-1)


def check_moments(
    device: torch.device, exp_avg: Tensor, exp_avg_sq: Tensor, words: Tensor, stochastic: bool, bound: float
) -> Tensor:
    """Compare codes, scales and decoded moments with the host's; the first moment clamped by the bound."""
    forms = (SignedQ8(), SquareQ8(stochastic))
    parts = [
        [torch.empty(N // part.elements, dtype=part.dtype, device=device) for part in form.parts] for form in forms
    ]
    decoded = torch.empty(3, N, device=device)
    blockwise_kernel[(1,)](
        exp_avg.to(device), exp_avg_sq.to(device), words.to(device), *parts[0], *parts[1], decoded, N, stochastic,
        rounded_bound(bound), enable_fp_fusion=False,
    )  # fmt: skip
    for row, (form, value) in enumerate(zip(forms, (exp_avg, exp_avg_sq), strict=True)):
        expected = form.encode(value, words)
        for got, wanted in zip(parts[row], expected, strict=True):
            assert torch.equal(bits(got), bits(wanted)), form.name
        assert torch.equal(bits(decoded[row]), bits(form.decode(expected)))
    return decoded[2]


@pytest.mark.parametrize("stochastic", [False, True])
def test_moments_in_8_bits_are_those_of_the_host(device: torch.device, stochastic: bool) -> None:
    for seed in range(64):
        exp_avg, exp_avg_sq = moments(seed)
        words = torch.randint(0, 65536, (N,), dtype=torch.int32)
        # No bound leaves all moments, those beside a second moment of 0 too.
        bound = 0.5 if seed % 2 else math.inf
        bounded = check_moments(device, exp_avg, exp_avg_sq, words, stochastic, bound)
        clamped = clamp_moment(exp_avg, square_root(exp_avg_sq), bound)
        assert torch.equal(bits(clamped), bits(exp_avg)) == math.isinf(bound)
        assert torch.equal(bits(bounded), bits(clamped))


@pytest.mark.parametrize("word", [0, 65535])
def test_the_extreme_words_round_as_on_the_host(device: torch.device, word: int) -> None:
    """Close to a code, where half a word decides."""
    codes = torch.arange(N).remainder(256).to(torch.uint8)
    scale = torch.linspace(1, 2, N // 64)
    codes[63::64] = 255
    exact = SquareQ8(True).decode((codes, scale))
    words = torch.full((N,), word, dtype=torch.int32)
    for direction in (0.0, torch.inf):
        near = torch.nextafter(exact, torch.tensor(direction))
        check_moments(device, torch.zeros(N), near, words, True, 0.5)


def test_a_second_moment_stays_where_its_word_is_as_far(device: torch.device) -> None:
    """As far between two codes, in fp32, as the word between 0 and 1: it moves on with lower words alone."""
    form, scale = SquareQ8(True), torch.ones(N // 64)
    codes = torch.arange(N).remainder(128).add(60).to(torch.uint8)
    here, beyond = (form.decode((each, scale)) for each in (codes, codes + 1))
    words = torch.randint(0, 20_000, (N,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    distance = (words + 0.5) / 2**16 * (beyond - here)
    value = here + distance
    # What makes the scale.
    value[::64] = 1
    is_as_far = value - here == distance
    assert is_as_far.any()
    assert torch.equal(form.encode(value, words)[0][is_as_far], codes[is_as_far])
    check_moments(device, torch.zeros(N), value, words, True, 0.5)


@pytest.mark.parametrize("first", [0, 8 * 12345, 2**36 - 512])
def test_words_are_those_of_the_host(device: torch.device, first: int) -> None:
    origin = torch.tensor([first, 0x7123456789ABCDEF, 77, 3], device=device)
    shared, each = (torch.empty(2, N, dtype=torch.int32, device=device) for _ in range(2))
    words_kernel[(1,)](origin, shared, each, N)
    expected = torch.stack(random_words([(Rounding(0x7123456789ABCDEF, 3, 77, first), N)]))
    assert torch.equal(shared.cpu(), expected)
    assert torch.equal(each.cpu(), expected)


def test_words_of_a_shard_that_starts_within_a_call(device: torch.device) -> None:
    origin = torch.tensor([8 * 5 + 3, -(2**63) + 5, 1, 2**31], device=device)
    each = torch.empty(2, N, dtype=torch.int32, device=device)
    words_each_kernel[(1,)](origin, each, N)
    expected = random_words([(Rounding(2**63 + 5, 2**31, 1, 8 * 5 + 3), N)])
    assert torch.equal(each.cpu(), torch.stack(expected))


def test_the_bound_is_that_of_the_host(device: torch.device) -> None:
    betas = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.999), (0.9, 0.5), (0.99, 0.5), (0.5, 0.0), (0.0, 0.0), (0.5, 0.25)]
    steps = [1, 2, 3, 10, 100, 300, 10**5, 2**24]
    cases = [(beta1, beta2, step) for beta1, beta2 in betas for step in steps]
    inputs = torch.tensor(cases, dtype=torch.float64, device=device).T.contiguous()
    bound = torch.empty(len(cases), device=device)
    bound_kernel[(1,)](inputs, bound, len(cases))
    expected = [rounded_bound(moment_bound(*case)) for case in cases]
    # One unit in the last place, where both round the same number but for its last bits in float64.
    assert torch.allclose(bound.cpu(), torch.tensor(expected), rtol=2**-23, atol=0)
    assert bound.isinf().any()
