"""Random words that depend on a seed, a tensor's stream and step, and an element's global index alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.bits import numpy_of

N_ROUNDS = 7
# Elements that share a call of `philox_4x32`: each takes 16 of its 128 bits.
ELEMENTS_PER_CALL = 8

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# Tensors, or NumPy's arrays.
Words = tuple[Any, Any, Any, Any]


class Rounding(NamedTuple):
    """What decides the random words of one parameter in one step.

    Attributes:
        seed: 64 bits, of the optimizer.
        stream: ordinal of the parameter when its state was made, below 2^32.
        step: the parameter's own step counter, a number or a tensor of one.
        first: global index of the first element here, in walking order.
    """

    seed: int
    stream: int
    step: int | Tensor
    first: int


# A parameter, and how many of its elements.
Span = tuple[Rounding, int]


def philox_4x32(counter: Words, key: tuple[int, int], n_rounds: int = N_ROUNDS) -> Words:
    """Encrypt a counter: Philox-4x32 of J. Salmon et al. (2011), https://doi.org/10.1145/2063384.2063405.

    Seven rounds pass BigCrush there. A counter word that has one element is multiplied once, not for each element.

    Args:
        counter: int64 tensors or arrays of 32-bit words, of shapes that broadcast.
        key: two 32-bit words.
        n_rounds: rounds to run.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(n_rounds):
        # An int64 product wraps: its bits are those of the unsigned one. Only factors must have 32 bits.
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product_1, product_0
        k0 += _KEY_STEPS[0]
        k1 += _KEY_STEPS[1]
    return c0, c1 & _MASK, c2, c3 & _MASK


def _calls(spans: Sequence[Span], ranges: Sequence[tuple[int, int]], device: torch.device | str) -> Tensor:
    """The words of a range of calls for each span, one after the other, int32 [calls, 4]."""
    (seed, _, step, _), _ = spans[0]
    index = torch.cat([torch.arange(*each, dtype=torch.int64, device=device) for each in ranges])
    # One element stands for a word that all have, as for the upper one below 2^35 elements.
    has_upper = any(end > _MASK for _, end in ranges)
    stream = index.new_tensor([rounding.stream for rounding, _ in spans])
    if len(spans) > 1:
        stream = stream.repeat_interleave(index.new_tensor([end - start for start, end in ranges]))
    steps = torch.as_tensor(step, device=device).to(torch.int64).reshape(1) & _MASK
    counter: Words = (index & _MASK, index >> 32 if has_upper else index.new_zeros(1), steps, stream)
    if numpy_of(index.device) is not None:
        counter = tuple(word.numpy() for word in counter)
    key = (seed & _MASK, seed >> 32 & _MASK)
    words = torch.empty(index.numel(), 4, dtype=torch.int32, device=device)
    for column, word in zip(words.unbind(1), philox_4x32(counter, key), strict=True):
        column.copy_(torch.as_tensor(word, device=device))
    return words


def random_words(spans: Sequence[Span], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Random words of 16 bits, two for each element: for the parameter, and for its second moment.

    The counter is (E lo, E hi, step, stream), where E is an element's global index // 8. The four words of 32
    bits have eight halves, the lower one of a word first: half index % 8 is the element's first word. Its
    second word is the same half after a rotation of the 32-bit words by a byte to the left.

    A word decides by its upper byte, but for one time in 256. No two of the four words of a pair of elements share
    their upper byte. So they are as good as independent, with half the calls.

    The spans count elements from `first` on, all in one step with one seed.

    Returns:
        Two int32 tensors of numbers in [0, 65536), those of all spans one after the other.
    """
    ranges, parts, start = [], [], 0
    for rounding, numel in spans:
        call, skipped = divmod(rounding.first, ELEMENTS_PER_CALL)
        end = -(-(rounding.first + numel) // ELEMENTS_PER_CALL)
        ranges.append((call, end))
        parts.append(slice(start + skipped, start + skipped + numel))
        start += (end - call) * ELEMENTS_PER_CALL
    words = _calls(spans, ranges, device)
    rotated = (words << 8).bitwise_or_((words >> 24).bitwise_and_(0xFF))
    first, second = _halves(words), _halves(rotated)
    if len(parts) == 1:
        return first[parts[0]], second[parts[0]]
    return torch.cat([first[part] for part in parts]), torch.cat([second[part] for part in parts])


def _halves(words: Tensor) -> Tensor:
    """The lower and the upper 16 bits of each word, in this order, as memory has them."""
    return words.view(torch.int16).view(-1).to(torch.int32).bitwise_and_(0xFFFF)
