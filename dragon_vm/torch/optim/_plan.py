"""The plan of a launch: which chunk of which tensor each program takes. Integers only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, repeat


def plan_chunks(numels: Sequence[int], chunk: int) -> array[int]:
    """Cut tensors into chunks of at most `chunk` elements, one for each program of a launch.

    Args:
        numels: elements of each tensor; an empty tensor gets no chunk.
        chunk: elements of a chunk, positive.

    Returns:
        int32 ``[2 * n_chunks]``: pairs of the tensor's row and the index of the chunk within the tensor.
    """
    counts = [-(-numel // chunk) for numel in numels]
    pairs = array("i", bytes(8 * sum(counts)))
    pairs[0::2] = array("i", chain.from_iterable(map(repeat, range(len(counts)), counts)))
    pairs[1::2] = array("i", chain.from_iterable(map(range, counts)))
    return pairs


def arena_offsets(numels: Sequence[int], alignment: int) -> list[int]:
    """Place tensors one after another in one buffer, each at a multiple of `alignment` elements.

    Returns:
        The first element of each tensor, then the length of the buffer: ``len(numels) + 1`` integers.
    """
    offsets = [0]
    for numel in numels:
        offsets.append(offsets[-1] + -(-numel // alignment) * alignment)
    return offsets
