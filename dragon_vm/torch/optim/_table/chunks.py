"""Chunks: which piece of which tensor each program of a launch takes. Integers only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, repeat


def plan_chunks(numels: Sequence[int], chunk: int, rows: Sequence[int] | None = None) -> array[int]:
    """Cut tensors into chunks of at most `chunk` elements, one for each program of a launch.

    Args:
        numels: elements of each tensor; an empty tensor gets no chunk.
        chunk: elements of a chunk, positive.
        rows: row of each tensor in its table; None for 0, 1, 2, ...

    Returns:
        int32 ``[2 * n_chunks]``: pairs of the tensor's row and the index of the chunk within the tensor.
    """
    counts = [n_chunks(numel, chunk) for numel in numels]
    pairs = array("i", bytes(8 * sum(counts)))
    rows = range(len(counts)) if rows is None else rows
    pairs[0::2] = array("i", chain.from_iterable(map(repeat, rows, counts)))
    pairs[1::2] = array("i", chain.from_iterable(map(range, counts)))
    return pairs


def n_chunks(numel: int, chunk: int) -> int:
    """Number of chunks of a tensor."""
    return -(-numel // chunk)
