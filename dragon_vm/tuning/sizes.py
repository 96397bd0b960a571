"""Size classes: which tensors count as alike when a configuration is looked up. Integers only."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

SMALL, TRANSFORMER, LARGE = "small", "transformer", "large"
SIZE_CLASSES = (LARGE, TRANSFORMER, SMALL)

# Mean elements of a tensor that part the classes: below the first a tensor is a handful of chunks and launches
# are about tables; above the second it is thousands of chunks, and everything else is about bandwidth.
SMALL_BELOW = 2**14
LARGE_FROM = 2**23

GPT2_WIDTH, GPT2_LAYERS, GPT2_VOCABULARY, GPT2_POSITIONS = 768, 12, 50257, 1024


class Case(NamedTuple):
    """Tensors to tune for.

    Attributes:
        name: as on the command line.
        size: what results are filed under: a size class, or the fingerprint of a model's own shapes.
        numels: elements of each tensor.
    """

    name: str
    size: str
    numels: tuple[int, ...]


def size_class(numels: Sequence[int]) -> str:
    """The class of tensors with these element counts, by their mean."""
    mean = sum(numels) / max(len(numels), 1)
    if mean < SMALL_BELOW:
        return SMALL
    return TRANSFORMER if mean < LARGE_FROM else LARGE


def fingerprint(numels: Sequence[int]) -> str:
    """A name for exactly these element counts, in any order."""
    return f"shapes-{hashlib.sha256(array('q', sorted(numels)).tobytes()).hexdigest()[:16]}"


def _gpt2() -> tuple[int, ...]:
    """Element counts of GPT-2 124M (https://huggingface.co/openai-community/gpt2), its head tied."""
    d = GPT2_WIDTH
    norm = (d, d)
    attention = (d * 3 * d, 3 * d, d * d, d)
    feed_forward = (d * 4 * d, 4 * d, 4 * d * d, d)
    layer = norm + attention + norm + feed_forward
    return (GPT2_VOCABULARY * d, GPT2_POSITIONS * d, *layer * GPT2_LAYERS, *norm)


CASES = {
    case.name: case
    for case in (
        Case(LARGE, LARGE, (2**27,)),
        Case(TRANSFORMER, TRANSFORMER, _gpt2()),
        Case(SMALL, SMALL, (1000,) * 1000),
    )
}
