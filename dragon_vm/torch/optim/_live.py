"""Parameter groups that say when they are written to, so that a graph's next replay reads the new numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakMethod

from dragon.vm.torch.optim._owner import Owner

Group = dict[str, Any]


class LiveGroup(dict[str, Any]):
    """A parameter group that calls back after each change. Its copies and pickles are plain dicts.

    Args:
        group: what it holds.
        changed: a method, called with this group while its object is alive.
    """

    def __init__(self, group: Mapping[str, Any], changed: Callable[[Group], None]) -> None:
        super().__init__(group)
        self._changed = WeakMethod(changed)

    def _report(self) -> None:
        changed = self._changed()
        if changed is not None:
            changed(self)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._report()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dict's; one change, however many keys."""
        super().update(*args, **kwargs)
        self._report()

    def __ior__(self, other: Any) -> LiveGroup:  # type: ignore[override,misc]  # a dict's has two signatures
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (dict(self),)


def make_live(optimizer: Owner) -> None:
    """Make those groups live whose steps may be captured: the ones with ``capturable=True``."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("capturable") and not isinstance(group, LiveGroup):
            optimizer.param_groups[index] = LiveGroup(group, optimizer._publish)
