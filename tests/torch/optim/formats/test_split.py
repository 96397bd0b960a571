import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.split import Master, Split8, Split16

CHUNK = 2**22
IS_SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"


def patterns(n: int) -> Iterator[Tensor]:
    """Ascending patterns of fp32 as int32, one of each of `n` equal ranges."""
    stride = 2**32 // n
    generator = torch.Generator().manual_seed(0)
    for start in range(-(2**31), 2**31, stride * CHUNK):
        offset = torch.randint(0, stride, (CHUNK,), generator=generator)
        yield (torch.arange(CHUNK) * stride + offset + start).to(torch.int32)


def parts_of(form: Split16 | Split8, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    half, remainder = form.encode(value, words)
    assert [half.dtype, remainder.dtype] == [part.dtype for part in form.parts]
    return half, remainder


def check_split16(n: int) -> None:
    for bits in patterns(n):
        value = bits.view(torch.float32)
        half, remainder = parts_of(Split16(), value)
        master = Split16().decode((half, remainder))
        expected = torch.where(value.isnan(), 0x7FC00000, bits)
        assert torch.equal(master.view(torch.int32), expected)
        assert torch.equal(half.isnan(), value.isnan())
        # Patterns ascend: away from 0 above it, and towards 0 below it.
        real = half.float()[~value.isnan()]
        falling, rising = real[1:] <= real[:-1], real[1:] >= real[:-1]
        assert falling.all() if bits[0] < 0 else rising.all()


def test_every_fp32_number_is_restored() -> None:
    check_split16(2**26)


@pytest.mark.skipif(not IS_SOAK, reason="minutes: HYPOTHESIS_PROFILE=soak")
def test_every_fp32_number_is_restored_all_of_them() -> None:
    check_split16(2**32)


def test_the_half_is_the_nearest_with_ties_away_from_zero() -> None:
    value = torch.randn(2**20)
    half, _ = parts_of(Split16(), value)
    ties = value.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(half[~ties], value.bfloat16()[~ties])
    tied = torch.tensor([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8])
    half, _ = parts_of(Split16(), tied)
    assert torch.equal(half.float(), torch.tensor([1 + 2**-7, -(1 + 2**-7), 1 + 2**-6]))


def test_the_largest_master_survives_its_infinite_half() -> None:
    value = torch.tensor([torch.finfo(torch.float32).max, float("inf"), -float("inf")])
    half, remainder = parts_of(Split16(), value)
    assert half.isinf().all()
    assert torch.equal(Split16().decode((half, remainder)), value)


def all_24_bit_numbers() -> Tensor:
    return (torch.arange(-(2**23), 2**23) << 8).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("stochastic", [False, True])
def test_every_24_bit_number_is_restored(stochastic: bool) -> None:
    form = Split8(stochastic)
    value = all_24_bit_numbers()
    words = torch.randint(0, 65536, value.shape, dtype=torch.int32)
    half, remainder = parts_of(form, value, words)
    master = form.decode((half, remainder))
    real = ~value.isnan()
    assert torch.equal(master.view(torch.int32)[real], value.view(torch.int32)[real])
    assert torch.equal(half.isnan(), value.isnan())
    positive = half.float()[(value >= 0) & real]
    assert (positive[:-1] <= positive[1:]).all()
    again = parts_of(form, master, words)
    assert torch.equal(again[0].view(torch.int16), half.view(torch.int16))
    assert torch.equal(again[1], remainder)


def test_24_bits_are_within_half_a_unit() -> None:
    for bits in patterns(2**23):
        value = bits.view(torch.float32)
        value = value[value.isfinite() & (value.abs() >= 2.0**-126) & (value.abs() < 3.4e38)]
        error = (Split8(False).decode(parts_of(Split8(False), value)).double() - value.double()).abs()
        assert (error <= 2.0**-16 * value.double().abs()).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("form", "unit"), [(Split16(), 1), (Split8(False), 2**8), (Split8(True), 2**8)])
def test_what_a_half_lacks_is_rounded_to_the_nearest_that_fits(
    form: Split16 | Split8, unit: int, sign: int
) -> None:
    half = torch.tensor(1.5 * sign, dtype=torch.bfloat16)
    distances = torch.arange(-(2**15) - 2, 2**15 + 3)
    masters = (half.float().view(torch.int32) + distances.to(torch.int32)).view(torch.float32)
    rest = torch.empty(masters.shape, dtype=form.parts[1].dtype)
    form.encode_rest(masters, half.expand_as(masters), rest)
    expected = (distances / unit + 0.5).floor().clamp(max=2**15 // unit - 1)
    assert torch.equal(rest.double(), expected.double().where(distances.abs() <= 2**15, 0.0))
    nearest = (distances >= -(2**15)) & (distances < 2**15)
    found = torch.empty_like(rest)
    form.encode_rest(masters, None, found)
    assert torch.equal(found[nearest], rest[nearest])


def test_the_mean_of_24_bits_over_all_bytes_is_the_number_itself() -> None:
    bits = torch.arange(255)[:, None] << 23 | torch.randint(0, 2**23, (255, 16))
    value = bits.to(torch.int32).view(torch.float32).reshape(-1)
    value = torch.cat([value, -value])[:, None].expand(-1, 256).contiguous()
    words = (torch.arange(256) << 8 | torch.randint(0, 256, (256,))).to(torch.int32)
    master = Split8(True).decode(parts_of(Split8(True), value, words.expand(value.shape)))
    in_range = value[:, 0].abs() < 3.4e38
    assert torch.equal((master.double().sum(1) / 256)[in_range], value[:, 0].double()[in_range])
    assert master.isfinite().all()


@pytest.mark.parametrize("stochastic", [False, True])
def test_no_finite_master_gets_infinite(stochastic: bool) -> None:
    value = torch.full((256,), torch.finfo(torch.float32).max)
    words = (torch.arange(256) << 8).to(torch.int32)
    for sign in (1, -1):
        master = Split8(stochastic).decode(parts_of(Split8(stochastic), sign * value, words))
        assert ((sign * master).view(torch.int32) == 0x7F7FFF00).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_is_kept_beside_the_parameter(dtype: torch.dtype) -> None:
    form = Master(dtype)
    value = torch.randn(1000)
    param, master = (each.to(part.dtype) for each, part in zip(form.encode(value), form.parts, strict=True))
    assert torch.equal(param, value.to(dtype))
    assert torch.equal(form.decode((param, master)), value)
    assert [part.suffix for part in form.parts] == ["", "_master"]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_keeps_the_master_that_it_is_nearest_to(dtype: torch.dtype, sign: int) -> None:
    unit, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    tie, too_large = 1 + unit / 2, torch.finfo(torch.float32).max
    kept = [(tie, 1.0), (tie, 1 + unit), (1 + unit / 4, 1.0), (too_large, torch.inf), (torch.inf, torch.inf)]
    left = [
        (tie, 1 + 2 * unit),
        (1 + unit / 4, 1 + unit),
        (too_large, largest),
        (torch.inf, 5.0),
        (torch.nan, 5.0),
    ]
    masters, halves = sign * torch.tensor([*kept, *left]).T
    written = torch.empty(len(masters))
    Master(dtype).encode_rest(masters, halves.to(dtype), written)
    assert torch.equal(written, torch.cat([masters[: len(kept)], halves[len(kept) :]]))
