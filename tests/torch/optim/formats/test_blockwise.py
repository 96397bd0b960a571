import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.blockwise import SignedQ8, SquareQ8
from dragon.vm.torch.optim._formats.format import BLOCK

SIGNED, SQUARE, STOCHASTIC = SignedQ8(), SquareQ8(False), SquareQ8(True)
FORMS = pytest.mark.parametrize("form", [SIGNED, SQUARE, STOCHASTIC], ids=lambda form: form.name)
Form = SignedQ8 | SquareQ8


def random_words(n: int) -> Tensor:
    return torch.randint(0, 65536, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(n))


def encoded(form: Form, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes, scale = form.encode(value, random_words(value.numel()) if words is None else words.reshape(-1))
    assert (codes.shape, scale.shape) == (value.shape, (value.numel() // BLOCK,))
    assert [codes.dtype, scale.dtype] == [part.dtype for part in form.parts]
    return codes, scale


def values(form: Form, n_blocks: int = 4096, exponents: tuple[float, float] = (-110, 100)) -> Tensor:
    """Blocks of scales far apart, each with elements that are far apart, and with zeros."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(n_blocks, 1, generator=generator, dtype=torch.float64)
    scale = 2 ** (exponents[0] + uniform * (exponents[1] - exponents[0]))
    spread = torch.rand(n_blocks, BLOCK, generator=generator, dtype=torch.float64) * 20
    value = (scale * torch.randn(n_blocks, BLOCK, generator=generator).double() * 2**-spread).float()
    value[torch.rand(value.shape, generator=generator) < 0.1] = 0
    value = value.reshape(-1)
    return value if form is SIGNED else value.square().clamp(max=3e38)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1].view(torch.int32), other[1].view(torch.int32))


@FORMS
def test_every_code_and_10_000_scales_stay_bit_for_bit(form: Form) -> None:
    info = torch.iinfo(form.parts[0].dtype)
    codes = torch.arange(max(info.min, -127), info.max + 1).to(form.parts[0].dtype)
    # Each block holds 63 codes beside the largest one, which makes the scale.
    blocks = torch.full((-(-codes.numel() // 63), BLOCK), info.max, dtype=codes.dtype)
    padded = torch.cat([codes, codes[-1:].expand(blocks.shape[0] * 63 - codes.numel())])
    blocks[:, 1:] = padded.view(-1, 63)
    low, high = (-96, 126.5) if form is SIGNED else (-42, 63.5)
    exponents = torch.linspace(low, high, 10_000, dtype=torch.float64)
    for scales in (2**exponents).float().split(1000):
        before = blocks.repeat(1000, 1).reshape(-1), scales.repeat_interleave(blocks.shape[0])
        assert same(encoded(form, form.decode(before)), before)


@FORMS
@pytest.mark.parametrize("exponents", [(-149.0, -60.0), (-60.0, 60.0), (60.0, 127.0)])
def test_what_is_stored_stays_bit_for_bit(form: Form, exponents: tuple[float, float]) -> None:
    stored = encoded(form, values(form, exponents=exponents))
    assert same(encoded(form, form.decode(stored)), stored)


@pytest.mark.parametrize(("form", "largest"), [(SIGNED, 127), (SQUARE, 255)])
def test_codes_are_the_nearest_and_rise_with_the_value(form: Form, largest: int) -> None:
    value = values(form, exponents=(-90, 100) if form is SIGNED else (-38, 60)).view(-1, BLOCK)
    codes, scale = encoded(form, value)
    root = value.double() if form is SIGNED else value.double().sqrt()
    assert ((scale - root.abs().amax(1)).abs() <= 2.0**-24 * scale).all()
    steps = largest * (root.abs() / scale[:, None]) ** 0.25
    error = (steps - codes.abs()).abs()
    # Half a step and the error of the fourth root; the code 1 also where 0 is nearer.
    assert (error[(codes.abs() != 1) | (steps > 0.5)] <= 0.5 + 1.5e-5 * largest).all()
    order = value.argsort(1)
    assert (codes.gather(1, order).int().diff(dim=1) >= 0).all()


@pytest.mark.parametrize("form", [SQUARE, STOCHASTIC])
def test_the_code_0_is_for_0_alone(form: Form) -> None:
    value = values(form, exponents=(-75, 60))
    codes, _ = stored = encoded(form, value)
    assert torch.equal(codes == 0, value == 0)
    assert torch.equal(form.decode(stored) == 0, value == 0)


def test_the_mean_over_all_words_is_the_second_moment_itself() -> None:
    """Within 2^-17 of a step, for values of every code and ten scales."""
    generator = torch.Generator().manual_seed(2)
    words = torch.arange(65536, dtype=torch.int32)
    for exponent in range(-38, 60, 10):
        scale = 2.0**exponent
        steps = 1 + 254 * torch.rand(BLOCK, generator=generator, dtype=torch.float64)
        steps[0] = 255
        value = ((scale * (steps / 255) ** 4) ** 2).float()
        stored = encoded(STOCHASTIC, value.repeat(65536, 1), words[:, None].expand(-1, BLOCK))
        mean = STOCHASTIC.decode(stored).double().mean(0)
        step = (scale * ((steps.floor() + 1) / 255) ** 4) ** 2 - (scale * (steps.floor() / 255) ** 4) ** 2
        assert ((mean - value.double()).abs() <= 2.0**-17 * step + 1e-7 * value).all()


def test_a_second_moment_is_stored_within_a_step() -> None:
    value = values(STOCHASTIC, exponents=(-38, 60)).view(-1, BLOCK)
    codes, scale = encoded(STOCHASTIC, value)
    steps = 255 * (value.double().sqrt() / scale[:, None]) ** 0.25
    assert ((steps - codes).abs()[(steps >= 1) | (steps == 0)] < 1.005).all()


@FORMS
def test_zeros_are_stored_as_zeros(form: Form) -> None:
    codes, scale = stored = encoded(form, torch.zeros(3 * BLOCK))
    assert not codes.any()
    assert not scale.any()
    assert not form.decode(stored).any()


@FORMS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_has_no_code_makes_its_block_nan_and_no_other(form: Form, bad: float) -> None:
    value = values(form, 3)
    value[70] = bad
    codes, scale = stored = encoded(form, value)
    assert scale.isnan().tolist() == [False, True, False]
    assert not codes[64:128].any()
    decoded = form.decode(stored)
    assert same(encoded(form, decoded), stored)
    assert decoded[64:128].isnan().all()
    assert decoded[:64].isfinite().all()
    assert decoded[128:].isfinite().all()


@FORMS
def test_a_block_depends_on_its_own_elements_alone(form: Form) -> None:
    value = values(form, 64)
    whole = encoded(form, value)
    words = random_words(value.numel())
    for block in (0, 17, 63):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        alone = encoded(form, value[part], words[part])
        assert same(alone, (whole[0][part], whole[1][block : block + 1]))


@FORMS
def test_parts_of_matrices_are_matrices(form: Form) -> None:
    shape = torch.Size((6, 2, BLOCK))
    value = values(form, 12).view(shape)
    codes, scale = form.encode(value, random_words(value.numel()).view(shape))
    scale = scale.view(form.parts[1].shape(shape))
    assert scale.shape == (6, 2)
    assert form.decode((codes, scale)).shape == shape
    assert same((codes.view(-1), scale.view(-1)), encoded(form, value.view(-1)))
