import pytest
import torch

from dragon.vm.torch.optim._formats.philox import N_ROUNDS, Rounding, philox_4x32, random_words

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
ONES = 0xFFFFFFFF
SEED = 0x0123456789ABCDEF


def rounding(**changes: int) -> Rounding:
    return Rounding(**{"seed": SEED, "stream": 3, "step": 5, "first": 0, **changes})


# Of Random123, kat_vectors: https://github.com/DEShawResearch/random123/blob/main/tests/kat_vectors.
@pytest.mark.parametrize(
    ("n_rounds", "counter", "key", "expected"),
    [
        (7, (0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (ONES,) * 4, (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, PI, (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, (0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_known_answers(n_rounds: int, counter: tuple, key: tuple[int, int], expected: tuple) -> None:
    words = philox_4x32(tuple(torch.tensor([word]) for word in counter), key, n_rounds)
    assert tuple(int(word) for word in words) == expected
    assert N_ROUNDS == 7


@pytest.mark.parametrize("n_calls", [2**32, 2**33])
def test_each_element_takes_the_half_and_the_rotated_half_of_its_call_that_the_contract_names(
    n_calls: int,
) -> None:
    start = 8 * n_calls - 16
    first, second = random_words([(rounding(first=start), 32)])
    for element in range(32):
        call, place = divmod(start + element, 8)
        counter = tuple(torch.tensor([word]) for word in (call & ONES, call >> 32, 5, 3))
        word = int(philox_4x32(counter, (SEED & ONES, SEED >> 32))[place // 2])
        rotated = (word << 8 | word >> 24) & ONES
        shift = 16 * (place % 2)
        assert int(first[element]) == word >> shift & 0xFFFF
        assert int(second[element]) == rotated >> shift & 0xFFFF


@pytest.mark.parametrize("first", [1, 3, 8, 17, 2**35 - 5])
def test_a_shard_takes_the_words_of_the_whole(first: int) -> None:
    start = first - first % 8
    whole = random_words([(rounding(first=start), 100)])
    for part, words in zip(random_words([(rounding(first=first), 50)]), whole, strict=True):
        assert torch.equal(part, words[first - start :][:50])
    assert all(words.numel() == 0 for words in random_words([(rounding(first=first), 0)]))


def test_words_of_several_tensors_are_those_of_each() -> None:
    firsts = [0, 3, 2**35 - 5, 8, 9, 2**35 + 1]
    spans = [(rounding(stream=n, first=first), 7 * n) for n, first in enumerate(firsts)]
    apart = [random_words([span]) for span in spans]
    for together, *words in zip(random_words(spans), *apart, strict=True):
        assert torch.equal(together, torch.cat(words))


def test_a_step_in_a_tensor_is_as_good_as_a_number() -> None:
    tensor = Rounding(SEED, 3, torch.tensor(5.0), 0)
    assert torch.equal(random_words([(tensor, 40)])[0], random_words([(rounding(), 40)])[0])


def test_a_step_takes_nothing_from_torchs_generators() -> None:
    before = torch.get_rng_state()
    random_words([(rounding(), 40)])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_steps_and_tensors_share_their_words() -> None:
    seen = set()
    for stream in range(1000):
        counter = (torch.arange(4)[:, None], torch.zeros(1, 1).long(), torch.arange(100), torch.tensor([[stream]]))
        calls = torch.stack(torch.broadcast_tensors(*philox_4x32(counter, (1, 2))), -1).reshape(-1, 4)
        seen.update(map(tuple, calls[:, :2].tolist()))
        if stream % 100 == 0:
            # The same calls by the way that a step takes.
            words = random_words([(Rounding(1 + (2 << 32), stream, 7, 0), 32)])[0].reshape(4, 8)
            assert torch.equal(words[:, 0] + (words[:, 1].long() << 16), calls.reshape(4, 100, 4)[:, 7, 0])
    assert len(seen) == 1000 * 100 * 4


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": SEED + 2**40}, {"stream": 4}, {"step": 6}, {"first": 8}])
def test_everything_that_should_decide_a_word_does(change: dict[str, int]) -> None:
    assert (random_words([(rounding(), 64)])[0] != random_words([(rounding(**change), 64)])[0]).all()


def test_a_step_beyond_32_bits_counts_by_its_last_ones_as_in_the_kernels() -> None:
    long, short = (random_words([(rounding(step=step), 64)])[0] for step in (2**40 + 5, 5))
    assert torch.equal(long, short)


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("value", [0, 1])
def test_words_are_uniform(value: int) -> None:
    words = random_words([(rounding(), 2**23)])[value]
    statistic = chi_square(torch.bincount(words, minlength=65536).double())
    # 65,535 degrees of freedom: a mean of 65,535 and a standard deviation of 362.
    assert abs(statistic - 65535) < 5 * 362


def test_the_words_of_neighbours_and_of_both_values_are_independent() -> None:
    first, second = random_words([(rounding(), 2**23)])
    pairs = [(first[0::2], first[1::2]), (first, second), (first[0::2], second[1::2]), (first[1::2], second[0::2])]
    for one, other in [*pairs, (second[0::2], second[1::2])]:
        counts = torch.bincount((one >> 8) * 256 + (other >> 8), minlength=65536).double()
        assert abs(chi_square(counts) - 65535) < 5 * 362


@pytest.mark.parametrize("n_spans", [1, 2, 3])
def test_parameters_together_have_the_words_of_each(n_spans: int) -> None:
    spans = [
        (Rounding(5, stream, 7, first), numel) for stream, first, numel in ((3, 0, 9), (4, 13, 30), (9, 8, 1))
    ]
    together = random_words(spans[:n_spans])
    each = [random_words([span]) for span in spans[:n_spans]]
    for found, alone in zip(together, zip(*each, strict=True), strict=True):
        assert torch.equal(found, torch.cat(alone))
