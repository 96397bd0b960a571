"""What a storage format is: the tensors that hold a value, and the way there and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Size, Tensor

# Elements of a block that share a scale.
BLOCK = 64


class Part(NamedTuple):
    """One of the tensors that hold a value.

    Attributes:
        suffix: what its key in the state has after the name of the value; "" for the value's own tensor.
        dtype: of the stored elements.
        elements: elements of the value for one stored element: 1, or `BLOCK` for a scale.
    """

    suffix: str
    dtype: torch.dtype
    elements: int = 1

    def shape(self, shape: Size) -> Size:
        """Shape of the part of a value of this shape: a scale has one column for a block of a row."""
        return shape if self.elements == 1 else Size((shape[0], shape[1:].numel() // self.elements))


class Format(Protocol):
    """How a value is stored.

    ``encode(decode(parts), words)`` makes the parts that `encode` made once more, bit for bit, whatever the words.
    Parts and value have one memory order; parts that share scales are contiguous.
    """

    @property
    def name(self) -> str:
        """Name of the format, the same on the device; that of a dtype for plain storage."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that hold the value."""

    @property
    def stochastic(self) -> bool:
        """Whether `encode` needs random words."""

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The stored value in fp32; in fp64 if it is stored so. It may be `parts[0]` itself."""

    def encode(self, value: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """What to copy to the parts: tensors of the value's shape, but for scales, which stand in a row.

        One may be the value itself, which copying rounds to the dtype of the part.

        Args:
            value: of the dtype that `decode` returns.
            words: int32 in [0, 65536) of the value's shape; None unless the format is stochastic.
        """


def required(words: Tensor | None, name: str) -> Tensor:
    """The words, which a stochastic format cannot do without.

    Raises:
        ValueError: there are none.
    """
    if words is None:
        raise ValueError(f"format {name!r} rounds stochastically: expected random words, got None")
    return words
