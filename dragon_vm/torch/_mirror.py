"""Fall back to PyTorch: names, submodules and type checks of whatever Dragon does not define itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Mirrored(type):
    """Metaclass of a Dragon class that stands in for one of PyTorch's.

    Code written for `torch.Tensor` or `torch.nn.Linear` asks `isinstance`, and means PyTorch's class: a
    tensor that a plain library returned has to pass. A class whose own namespace holds `__mirrors__`
    therefore answers for the class named there. Its subclasses answer for themselves.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        mirrored = cls.__dict__.get("__mirrors__")
        return isinstance(instance, mirrored) if mirrored else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        mirrored = cls.__dict__.get("__mirrors__")
        return issubclass(subclass, mirrored) if mirrored else super().__subclasscheck__(subclass)


def mirror(real_name: str, namespace: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of a module that falls back to one of PyTorch's.

    Nothing is cached: a name is looked up in PyTorch's module each time, so that it is always what PyTorch
    has now.

    Args:
        real_name: PyTorch's module, such as `"torch.optim"`.
        namespace: `globals()` of the Dragon module.

    Returns:
        The two functions, to be assigned to `__getattr__` and `__dir__`.
    """
    real = importlib.import_module(real_name)
    own_name = namespace["__name__"]

    def get_attribute(name: str) -> Any:
        try:
            return getattr(real, name)
        except AttributeError:
            raise AttributeError(f"module {own_name!r} has no attribute {name!r}") from None

    def list_names() -> list[str]:
        return sorted({*namespace, *dir(real)})

    return get_attribute, list_names


class _AliasLoader(Loader):
    """Puts PyTorch's own module object under Dragon's name.

    It inherits `create_module`: the import system makes an empty module, which it throws away after `exec_module`.
    To return PyTorch's there would let the import system write another `__spec__` into it.
    """

    def __init__(self, real_name: str) -> None:
        self._real_name = real_name

    def exec_module(self, module: ModuleType) -> None:
        """Replace the empty module by PyTorch's: the import system takes what stands in `sys.modules`."""
        sys.modules[module.__name__] = importlib.import_module(self._real_name)


class MirrorFinder(MetaPathFinder):
    """Finds `dragon.vm.torch.x.y` as `torch.x.y` where Dragon has no such module of its own.

    It has to stand before Python's own finder: below an alias (`dragon.vm.torch.utils` is `torch.utils`) that
    one would find PyTorch's file and load it a second time under Dragon's name.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an alias, or None to leave the import to the other finders."""
        if not fullname.startswith("dragon.vm.torch."):
            return None
        parent_name = fullname.rpartition(".")[0]
        parent_is_own = sys.modules[parent_name].__name__ == parent_name
        if parent_is_own and self._has_own(fullname, path):
            return None
        real_name = fullname.removeprefix("dragon.vm.")
        if not _exists(real_name):
            return None
        # A package: until it is replaced, another thread may import a module below it.
        return ModuleSpec(fullname, _AliasLoader(real_name), is_package=True)

    def _has_own(self, fullname: str, path: Sequence[str] | None) -> bool:
        """Whether Dragon has a module, in whatever way it was packed: in some it is not found by a path."""
        finders = list(sys.meta_path)
        # It is not among them where somebody has wrapped it.
        later = finders[finders.index(self) + 1 :] if self in finders else []
        # Finders of Python 3.11 and earlier may have another method only.
        asked: list[Any] = [PathFinder, *(finder for finder in later if hasattr(finder, "find_spec"))]
        return any(finder.find_spec(fullname, path) is not None for finder in asked)


def _exists(real_name: str) -> bool:
    if real_name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(real_name) is not None
    except ModuleNotFoundError:
        return False


def install_finder() -> None:
    """Put the finder in front of the others, once."""
    if not any(isinstance(finder, MirrorFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MirrorFinder())
