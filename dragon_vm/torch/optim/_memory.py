"""Words of memory, read at the addresses of live objects."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

WORD = 8
# Address 0 is not allowed for a tensor: all of memory, from the second word on.
_ALL_WORDS = ctypes.c_int64 * (1 << 44)


def word_at(address: int) -> int:
    """The word at an address."""
    return ctypes.c_int64.from_address(address).value


def words_at(address: int, length: int) -> list[int]:
    """The first words at an address."""
    return [word_at(address + WORD * index) for index in range(length)]


def positions(addresses: Tensor) -> Tensor:
    """Positions of the words at these addresses, in `Memory`."""
    return (addresses >> 3) - 1


def objects(things: Sequence[object]) -> Tensor:
    """Positions of the first words of Python objects, int64 [len(things)]."""
    return positions(torch.tensor(list(map(id, things)), dtype=torch.int64, device="cpu"))


class Memory:
    """All of memory, to read words of live objects from; no tensor of it for a debugger to print."""

    def __init__(self) -> None:
        self._read = partial(
            torch.index_select, torch.frombuffer(_ALL_WORDS.from_address(WORD), dtype=torch.int64), 0
        )

    def __repr__(self) -> str:
        return "Memory()"

    def read(self, where: Tensor, out: Tensor) -> None:
        """Read the words at these positions into `out`, int64 of as many."""
        self._read(where, out=out)


@contextmanager
def open_memory() -> Iterator[Memory]:
    """Memory to read from, while no mode sees the operations and looks at operands that are not all there."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield Memory()


class Words:
    """Words of memory as they were, and as they are.

    Args:
        where: their positions; assign others to look elsewhere.
    """

    def __init__(self, where: Tensor) -> None:
        self.where, self._then = where, b""
        # Two blocks of bytes are compared faster than two tensors.
        self.now = bytearray(8 * len(where))
        with torch.inference_mode(False):
            self.words = torch.frombuffer(self.now, dtype=torch.int64)
        with open_memory() as memory:
            self.read(memory)
        self.keep()

    def read(self, memory: Memory) -> bool:
        """Read them anew; whether they are as they were."""
        memory.read(self.where, out=self.words)
        return self.now == self._then

    def keep(self) -> None:
        """As they are is how they were, from here on."""
        self._then = bytes(self.now)
