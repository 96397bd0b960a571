"""Dicts and lists as they were, and whether they still are: read where CPython keeps what tells.

Up to version 3.13 a dict gets a new number, which no other has had, at each change. Where that is, and where a
list has its items, nobody promises: it is searched for with known changes, and where it is not found, everything
is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import torch

from dragon.vm.torch.optim._identity import same_tensors
from dragon.vm.torch.optim._memory import WORD, Words, objects, open_memory, positions, words_at

# So few are compared faster than they are read.
FEW = 32
# No memory is below this address.
_LOWEST = 1 << 16
_CHANGES: tuple[Callable[[dict[str, Any]], object], ...] = (
    lambda d: d.__setitem__("a", None),
    lambda d: d.__setitem__("b", None),
    lambda d: d.__delitem__("a"),
    lambda d: d.update(a=1),
    lambda d: d.__ior__({"a": 2}),
    lambda d: d.setdefault("c", 3),
    lambda d: d.pop("b"),
    lambda d: d.popitem(),
    lambda d: d.clear(),
    lambda d: d.update({"a": 4}),
)


class ContainerWatch:
    """Remembers the items of dicts and lists, tensors by identity; it holds them.

    What items hold in turn may change unseen.

    Args:
        dicts: or what else has keys and values.
        lists: or other sequences.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], lists: Sequence[Sequence[Any]]) -> None:
        self._dicts, self._lists = list(dicts), list(lists)
        self._copies = list(map(dict, dicts)), list(map(list, lists))
        self._words = self._look()

    def is_unchanged(self) -> bool:
        """Whether all have the same items."""
        if self._words:
            with open_memory() as memory:
                if all(words.read(memory) for words in self._words):
                    return True
        if not same_tensors((self._dicts, self._lists), self._copies):
            return False
        # What is equal but another object may change later: it goes on being compared.
        if self._words and self._are_identical():
            self._words = self._look()
        return True

    def _are_identical(self) -> bool:
        """Whether equal items are the same objects."""
        dicts, lists = self._copies
        return all(
            then.get(key) is value
            for now, then in zip(self._dicts, dicts, strict=True)
            for key, value in now.items()
        ) and all(all(map(is_, now, then)) for now, then in zip(self._lists, lists, strict=True))

    def _look(self) -> list[Words]:
        """Words that change with the items, addresses before what is there; none where all is compared."""
        found = container_map() if len(self._dicts) + len(self._lists) > FEW else None
        if found is None or not (_are(dict, self._dicts) and set(map(type, self._lists)) <= {list}):
            return []
        dicts, lists = objects(self._dicts), objects(self._lists)
        words = [Words(torch.cat([dicts + found.version, lists + found.length, lists + found.items]))]
        within = [index for items in self._lists for index in range(len(items))]
        if within:
            lengths, items = words[0].words[len(dicts) :].view(2, -1).unbind()
            firsts = positions(items).repeat_interleave(lengths)
            words.append(Words(firsts + torch.tensor(within, dtype=torch.int64, device="cpu")))
        return words


class ContainerMap(NamedTuple):
    """Where the words are, counted from the start of a container.

    Attributes:
        version: the number of a dict, new at each change of its items.
        length: how many items a list has.
        items: the address of the address of the first.
    """

    version: int
    length: int
    items: int


@cache
def container_map() -> ContainerMap | None:
    """Where this Python keeps the words; None if they are not found."""
    try:
        return ContainerMap(_search_version(), *_search_items())
    except LookupError:
        return None


def _search_version() -> int:
    """Which word of a dict grows whenever an item changes."""
    probe: dict[str, Any] = {"a": 0}
    seen = [_header(probe)]
    for change in _CHANGES:
        change(probe)
        seen.append(_header(probe))
    return _only(list(values) == sorted(set(values)) for values in zip(*seen, strict=True))


def _search_items() -> tuple[int, int]:
    """Which words of a list are its length and the address of its items."""
    probe: list[Any] = []
    empty = _header(probe)
    for n in range(5):
        probe.append(n)
    full = _header(probe)
    length = _only(word == len(probe) for word in full)
    # The one address that an empty list does not have.
    items = _only(then == 0 and now >= _LOWEST for then, now in zip(empty, full, strict=True))
    if words_at(full[items], len(probe)) != list(map(id, probe)):
        raise LookupError("a list's items are not where it points to")
    return length, items


def _header(container: Any) -> list[int]:
    return words_at(id(container), type(container).__basicsize__ // WORD)


def _only(found: Iterable[bool]) -> int:
    """Which is true.

    Raises:
        LookupError: if not one is.
    """
    indices = [index for index, is_it in enumerate(found) if is_it]
    if len(indices) != 1:
        raise LookupError(f"{len(indices)} words instead of one")
    return indices[0]


def _are(kind: type, things: Sequence[object]) -> bool:
    return all(isinstance(thing, kind) for thing in things)
