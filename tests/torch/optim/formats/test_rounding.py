import numpy as np
import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim._formats import bits, philox
from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._formats.philox import Rounding, random_words
from dragon.vm.torch.optim._formats.rounding import Plain, StochasticBfloat16, UpwardBfloat16

WORDS = torch.arange(65536, dtype=torch.int32)
LARGEST = torch.finfo(torch.bfloat16).max


def numbers(per_binade: int) -> Tensor:
    """Numbers of every binade and both signs, subnormal ones included."""
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.randint(0, 2**23, (255, per_binade), generator=generator)
    bits = (torch.arange(255)[:, None] << 23 | mantissa).to(torch.int32).view(torch.float32).reshape(-1)
    return torch.cat([bits, -bits])


def encoded(form: StochasticBfloat16 | UpwardBfloat16, value: Tensor, words: Tensor | None = None) -> Tensor:
    (stored,) = form.encode(value, words)
    assert stored.dtype == torch.bfloat16
    return stored


def test_the_mean_over_all_words_is_the_number_itself() -> None:
    value = numbers(2)
    value = value[value.abs() <= LARGEST]
    assert value.numel() >= 1000
    for part in value.split(64):
        stored = encoded(StochasticBfloat16(), part[:, None].expand(-1, 65536).contiguous(), WORDS)
        assert torch.equal(stored.double().sum(1) / 65536, part.double())


def test_the_result_is_one_of_the_two_neighbours() -> None:
    value = numbers(64)
    words = torch.randint(0, 65536, value.shape, dtype=torch.int32)
    stored = encoded(StochasticBfloat16(), value, words)
    below = (value.view(torch.int32) & -65536).view(torch.float32)
    above = ((value.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((stored.float() == below) | (stored.float() == above)).all()
    assert stored.isfinite().all()


@pytest.mark.parametrize("form", [StochasticBfloat16(), UpwardBfloat16()])
def test_what_is_stored_stays_bit_for_bit(form: StochasticBfloat16 | UpwardBfloat16) -> None:
    stored = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)
    again = encoded(form, form.decode((stored,)), WORDS.flip(0))
    real = ~stored.isnan()
    assert torch.equal(again.view(torch.int16)[real], stored.view(torch.int16)[real])
    assert again[~real].isnan().all()


@pytest.mark.parametrize("form", [StochasticBfloat16(), UpwardBfloat16()])
def test_a_nan_stays_one_and_infinity_too(form: StochasticBfloat16 | UpwardBfloat16) -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF, 0x7FFF8000], dtype=torch.int32)
    assert encoded(form, bits.view(torch.float32), torch.full((5,), 65535, dtype=torch.int32)).isnan().all()
    infinite = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(encoded(form, infinite, torch.full((2,), 65535, dtype=torch.int32)).float(), infinite)


def test_no_finite_number_gets_infinite() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, LARGEST]).repeat(65536, 1).T.contiguous()
    assert (encoded(StochasticBfloat16(), largest, WORDS) == LARGEST).all()
    assert (encoded(StochasticBfloat16(), -largest, WORDS) == -LARGEST).all()


def test_upwards_is_the_least_number_that_is_not_below() -> None:
    borders = torch.arange(-(2**31), 2**31, 2**16)[:, None] + torch.tensor([0, 1, 2**16 - 1])
    value = torch.cat([numbers(256), borders.to(torch.int32).view(torch.float32).flatten()])
    value = value[value.isfinite() & (value <= LARGEST)]
    stored = encoded(UpwardBfloat16(), value)
    assert (stored.float() >= value).all()
    bits = stored.view(torch.int16).to(torch.int32)
    below = torch.where(bits > 0, bits - 1, bits + 1).to(torch.int16).view(torch.bfloat16)
    assert (below.float()[stored != 0] < value[stored != 0]).all()
    order = value.argsort()
    assert (stored.float()[order].diff() >= 0).all()


def test_stochastic_formats_ask_for_words() -> None:
    with pytest.raises(
        ValueError, match="'bfloat16_stochastic' rounds stochastically: expected random words, got None"
    ):
        encoded(StochasticBfloat16(), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_storage_is_a_cast(dtype: torch.dtype) -> None:
    value = torch.randn(1000, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    stored = [each.to(dtype) for each in Plain(dtype).encode(value)]
    assert torch.equal(stored[0], value.to(dtype))
    decoded = Plain(dtype).decode(stored)
    assert decoded.dtype == value.dtype
    assert torch.equal(decoded, stored[0].to(value.dtype))
    assert Plain(dtype).name == str(dtype).removeprefix("torch.")


@pytest.fixture(params=["NumPy", "PyTorch alone"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch alone":
        for module in (bits, philox):
            monkeypatch.setattr(module, "numpy_of", lambda device: None)
    else:
        assert bits.numpy_of(torch.device("cpu")) is not None


@pytest.mark.usefixtures("arithmetic")
def test_words_are_the_same_with_and_without_numpy() -> None:
    first, second = random_words([(Rounding(2**63 + 12345, 2**32 - 1, torch.tensor(7.0), 2**36 - 40), 64)])
    assert first[:4].tolist() == [23097, 36106, 20587, 1862]
    assert second[-4:].tolist() == [1527, 43513, 62104, 40416]


@pytest.mark.usefixtures("arithmetic")
def test_the_root_of_what_has_none_is_nan() -> None:
    assert square_root(torch.tensor([-1.0, torch.nan, torch.inf, 0.0])).tolist()[2:] == [torch.inf, 0.0]
    with np.errstate(invalid="raise"):
        assert square_root(torch.tensor([-1.0, torch.nan])).isnan().all()


@pytest.mark.usefixtures("arithmetic")
def test_roots_are_correctly_rounded() -> None:
    value = numbers(1000).abs()
    root = square_root(value)
    assert root.dtype == torch.float32
    root = root.double()
    above = torch.nextafter(root.float(), torch.tensor(float("inf"))).double()
    below = torch.nextafter(root.float(), torch.tensor(0.0)).double()
    # Exact in fp64: the middles have 25 bits, their squares 50.
    assert (((root + above) / 2) ** 2 >= value.double()).all()
    assert (((root + below) / 2) ** 2 <= value.double()).all()
