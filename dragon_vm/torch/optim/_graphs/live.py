"""Parameter groups that say when they are written to, so that a graph's next replay reads the new numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any
from weakref import WeakMethod

Group = dict[str, Any]


def _watched(write: Callable[..., Any]) -> Any:
    """A method of dict for a live group: one change, however many keys."""

    @wraps(write)
    def change(group: LiveGroup, *args: Any, **kwargs: Any) -> Any:
        before = dict(group)
        result = write(group, *args, **kwargs)
        changed = group.changed and group.changed()
        if changed:
            try:
                changed(group)
            except Exception:
                dict.clear(group)
                dict.update(group, before)
                raise
        return result

    return change


class LiveGroup(dict[str, Any]):
    """A parameter group that calls back after each change, and takes it back if that fails; its copies do not."""

    # Called with the group after each change, while its object is alive.
    changed: WeakMethod[Callable[[Group], None]] | None = None

    __setitem__ = _watched(dict.__setitem__)
    __delitem__ = _watched(dict.__delitem__)
    pop = _watched(dict.pop)
    popitem = _watched(dict.popitem)
    setdefault = _watched(dict.setdefault)
    update = _watched(dict.update)
    __ior__ = _watched(dict.__ior__)

    def __copy__(self) -> Group:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Something that `torch.load(weights_only=True)` lets pass.
        return OrderedDict, (list(self.items()),)


def make_live(groups: list[Group], changed: Callable[[Group], None]) -> None:
    """Replace groups with ``capturable=True``, whose steps may be captured, by live ones.

    `changed` is a method that is called with a group after each change.
    """
    for index, group in enumerate(groups):
        if group.get("capturable") and not isinstance(group, LiveGroup):
            live = LiveGroup(group)
            live.changed = WeakMethod(changed)
            groups[index] = live


def unwatched(groups: list[Group]) -> list[Group]:
    """The very groups, which an optimizer and its copy by `copy.copy` share; copies if one calls back."""
    return list(map(dict, groups)) if any(isinstance(group, LiveGroup) for group in groups) else groups
