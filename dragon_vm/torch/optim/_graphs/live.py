"""Parameter groups that say when they are written to, so that a graph's next replay reads the new numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from weakref import WeakMethod

Group = dict[str, Any]


class LiveGroup(dict[str, Any]):
    """A parameter group that calls back after each change, and takes it back if that fails; its copies do not."""

    _changed: WeakMethod[Callable[[Group], None]] | None = None

    def watch(self, changed: Callable[[Group], None]) -> LiveGroup:
        """Call this method with the group after each change, while its object is alive."""
        self._changed = WeakMethod(changed)
        return self

    def _write(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = dict(self)
        result = write(*args, **kwargs)
        changed = self._changed and self._changed()
        if changed:
            try:
                changed(self)
            except Exception:
                super().clear()
                super().update(before)
                raise
        return result

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(super().__setitem__, key, value)

    def __delitem__(self, key: str) -> None:
        self._write(super().__delitem__, key)

    def pop(self, *args: Any) -> Any:
        """As a dict's."""
        return self._write(super().pop, *args)

    def popitem(self) -> Any:
        """As a dict's."""
        return self._write(super().popitem)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        return self._write(super().setdefault, key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dict's; one change, however many keys."""
        self._write(super().update, *args, **kwargs)

    def __ior__(self, other: Any) -> LiveGroup:  # type: ignore[override,misc]  # a dict's has two signatures
        self.update(other)
        return self

    def __copy__(self) -> Group:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Something that `torch.load(weights_only=True)` lets pass.
        return OrderedDict, (list(self.items()),)


def make_live(groups: list[Group], changed: Callable[[Group], None]) -> None:
    """Make those groups live whose steps may be captured: the ones with ``capturable=True``.

    Args:
        groups: parameter groups; a live one takes the place of each.
        changed: a method that is called with a group after each change.
    """
    for index, group in enumerate(groups):
        if group.get("capturable") and not isinstance(group, LiveGroup):
            groups[index] = LiveGroup(group).watch(changed)
