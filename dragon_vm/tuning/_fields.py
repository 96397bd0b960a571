"""Typed reading of plain data that anyone may have edited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class RecordError(ValueError):
    """A file holds something else than a tuning result; the text says what."""


class Fields:
    """The fields of a JSON object; every read says which field is wrong and how.

    Args:
        data: what was read.
        where: the object's own path, for messages.

    Raises:
        RecordError: by every method, and if the data is no object.
    """

    def __init__(self, data: Any, where: str = "") -> None:
        if not isinstance(data, dict):
            raise RecordError(f"{where or 'the file'} is no JSON object")
        self._data, self._where = data, where

    def _name(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _get(self, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
        if name not in self._data:
            raise RecordError(f"{self._name(name)} is missing")
        value = self._data[name]
        # A bool is an int to Python, and not to anybody who reads the file.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise RecordError(f"{self._name(name)} must be {what}, not {value!r:.40}")
        return value

    def names(self) -> list[str]:
        """Names of all fields."""
        return list(self._data)

    def text(self, name: str, allow_empty: bool = False) -> str:
        """A string."""
        value: str = self._get(name, str, "a string")
        if not (value or allow_empty):
            raise RecordError(f"{self._name(name)} is empty")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of some strings."""
        value = self.text(name, allow_empty=True)
        if value not in choices:
            raise RecordError(
                f"{self._name(name)} must be one of {', '.join(map(repr, choices))}, not {value!r:.40}"
            )
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        return bool(self._get(name, bool, "true or false"))

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer in [low, high]."""
        value: int = self._get(name, int, "an integer")
        if not low <= value <= high:
            raise RecordError(f"{self._name(name)} must be in [{low}, {high}], not {value}")
        return value

    def power_of_two(self, name: str, low: int, high: int) -> int:
        """A power of two in [low, high]."""
        value = self.integer(name, low, high)
        if value & (value - 1):
            raise RecordError(f"{self._name(name)} must be a power of two, not {value}")
        return value

    def number(self, name: str, positive: bool = False) -> float:
        """A finite number."""
        try:
            value = float(self._get(name, (int, float), "a number"))
        except OverflowError:
            value = math.inf
        if not math.isfinite(value) or (positive and value <= 0):
            raise RecordError(f"{self._name(name)} must be a {'positive' if positive else 'finite'} number")
        return value

    def inner(self, name: str) -> Fields:
        """An object."""
        return Fields(self._get(name, dict, "an object"), self._name(name))

    def optional(self, name: str) -> Fields | None:
        """An object, or null."""
        return None if self._data.get(name) is None else self.inner(name)

    def items(self, name: str) -> list[Fields]:
        """A list of objects."""
        return [Fields(value, f"{self._name(name)}[{i}]") for i, value in enumerate(self.values(name))]

    def values(self, name: str) -> list[Any]:
        """A list of anything."""
        values: list[Any] = self._get(name, list, "a list")
        return values
