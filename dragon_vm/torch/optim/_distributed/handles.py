"""What an optimizer only borrows: copies borrow it too, and pickles cannot hold it."""

from __future__ import annotations

from typing import Any, NoReturn

_NAMES = ("process_group", "release_gradients")


class Borrowed:
    """An option's value that belongs to this process: a process group, or a `GradScaler` that somebody updates."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"an optimizer with {self.name}={self.value!r} cannot be pickled: save its state_dict(), and load it "
            f"into an optimizer that is constructed with {self.name}"
        )


def borrowed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of which those that belong to this process are borrowed."""
    held = {name: options.get(name) for name in _NAMES}
    own = {name: Borrowed(name, value) for name, value in held.items() if value not in (None, False, True)}
    return {**options, **own}


def returned(options: dict[str, Any]) -> dict[str, Any]:
    """The options that `borrowed` was given."""
    return {name: value.value if isinstance(value, Borrowed) else value for name, value in options.items()}
