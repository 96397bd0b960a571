"""Random words that depend on a seed, a tensor's stream and step, and an element's global index alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

N_ROUNDS = 7
# Elements that share a call of `philox_4x32` where one value, or two, are rounded.
ELEMENTS_PER_CALL = {1: 8, 2: 4}

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Rounding(NamedTuple):
    """What decides the random words of one parameter in one step.

    Attributes:
        seed: 64 bits, of the optimizer.
        stream: ordinal of the parameter when its state was made, below 2^32.
        step: the parameter's own step counter, a number or a tensor of one.
        first: global index of the first element here, in walking order.
        targets: values that are rounded stochastically, 1 or 2.
    """

    seed: int
    stream: int
    step: int | Tensor
    first: int
    targets: int


def philox_4x32(counter: Words, key: tuple[int, int], n_rounds: int = N_ROUNDS) -> Words:
    """Encrypt a counter: Philox-4x32 of J. Salmon et al. (2011), https://doi.org/10.1145/2063384.2063405.

    Seven rounds pass BigCrush there. Counter words that are one-element tensors are multiplied once, not for each
    element.

    Args:
        counter: int64 tensors of 32-bit words, of shapes that broadcast.
        key: two 32-bit words.
        n_rounds: rounds to run.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(n_rounds):
        # An int64 product wraps: its bits are those of the unsigned one.
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ (c1 ^ k0)) & _MASK
        c2 = ((product_0 >> 32) ^ (c3 ^ k1)) & _MASK
        c1 = product_1 & _MASK
        c3 = product_0 & _MASK
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _calls(first: int, last: int, rounding: Rounding, device: torch.device) -> Tensor:
    """The words of the calls `first` to `last`, int64 [calls, 4]."""
    index = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    # Below 2^34 elements the upper word is 0 for all: one element stands for them.
    upper = index >> 32 if last >> 32 else index.new_zeros(1)
    step = torch.as_tensor(rounding.step, device=device).to(torch.int64).reshape(1)
    counter = (index & _MASK, upper, step, index.new_full((1,), rounding.stream))
    key = (rounding.seed & _MASK, rounding.seed >> 32 & _MASK)
    return torch.stack(torch.broadcast_tensors(*philox_4x32(counter, key)), -1)


def random_bits(rounding: Rounding, numel: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Random numbers of 16 bits, one for each element and target.

    The counter is (E lo, E hi, step, stream). With two targets E is the global index of an element // 4, and word
    index % 4 serves it: its lower half the first target, its upper half the second. With one target E is the
    index // 8, and half index % 8 serves it, the lower half of a word first.

    Args:
        rounding: the parameter and step.
        numel: elements from `rounding.first` on.
        device: where the numbers are made.

    Returns:
        An int32 tensor [numel] of numbers in [0, 65536) for each target: parameter, then exp_avg_sq.
    """
    if numel == 0:
        return tuple(torch.empty(0, dtype=torch.int32, device=device) for _ in range(rounding.targets))
    width = ELEMENTS_PER_CALL[rounding.targets]
    call, skipped = divmod(rounding.first, width)
    words = _calls(call, (rounding.first + numel - 1) // width, rounding, torch.device(device))
    halves = (words & 0xFFFF).to(torch.int32), (words >> 16).to(torch.int32)
    if rounding.targets == 1:
        halves = (torch.stack(halves, -1),) * 2
    return tuple(half.reshape(-1)[skipped : skipped + numel] for half in halves[: rounding.targets])
