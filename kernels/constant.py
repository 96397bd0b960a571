"""Records that a kernel takes as one compile-time constant."""

from __future__ import annotations

from typing import Any


class Constant(str):
    """Base of a frozen dataclass whose instances are compile-time constants of kernels.

    An instance is a text too. Triton writes the constants of a kernel as JSON for compile hooks, which PyTorch and
    profilers install, and JSON takes no dataclass (triton 3.6 and 3.7). Triton finds a cached kernel by the
    ``str()`` of its constants, which names all fields.
    """

    __slots__ = ()

    def __new__(cls, *_values: Any, **_named: Any) -> Constant:
        """Make a text that names the class; the dataclass fills in the fields."""
        return super().__new__(cls, cls.__name__)

    def __ne__(self, other: object) -> bool:
        """The opposite of the dataclass's comparison, which does not replace that of a text."""
        return not self == other

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)
