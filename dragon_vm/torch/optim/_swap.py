"""Build our optimizers where code asks for PyTorch's, without a change to that code."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from dragon.vm.torch.optim import adam as ours


class Replaced:
    """One optimizer that was built in the place of PyTorch's.

    Attributes:
        name: of PyTorch's class.
        n_steps: steps so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        self.name = name
        self.n_steps = 0
        self._optimizer = weakref.ref(optimizer)
        self._counts = (0, 0)
        self.counts()
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n_steps += 1

    def counts(self) -> tuple[int, int]:
        """How many tensors it updates, and their elements; as last asked for if it is gone."""
        optimizer = self._optimizer()
        if optimizer is not None:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            lazy = torch.nn.parameter.is_lazy
            self._counts = (len(params), sum(param.numel() for param in params if not lazy(param)))
        return self._counts


class Swap:
    """A swap that is in force, until `undo` or the end of a ``with`` block.

    Attributes:
        replaced: what was built in the place of PyTorch's optimizers since, in order.
    """

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        _install()
        _swaps.append(self)

    def undo(self) -> None:
        """Let PyTorch's classes build PyTorch's optimizers again; those already built stay ours."""
        if self in _swaps:
            _swaps.remove(self)

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


_swaps: list[Swap] = []


def swap() -> Swap:
    """Make `torch.optim.Adam` and `AdamW` build ours, with ``epsilon_hat=False``, PyTorch's formula.

    The classes stay the same objects, so it does not matter who imported them when, and what is built passes
    `isinstance` for them. Subclasses that others derived from them are left alone.

    Returns:
        What undoes it: a context manager, with a method `undo`.
    """
    return Swap()


def asked_to_fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a `GradScaler` leaves unscaling to the step; in PyTorch's only if ``fused=True`` was asked for."""
    return optimizer.defaults["fused"] is True


class Adam(ours.Adam, torch.optim.Adam):
    """Stands in for `torch.optim.Adam`."""

    _step_supports_amp_scaling = property(asked_to_fuse)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("epsilon_hat", False)
        super().__init__(*args, **kwargs)
        _record(self)


class AdamW(ours.AdamW, torch.optim.AdamW):
    """Stands in for `torch.optim.AdamW`."""

    _step_supports_amp_scaling = property(asked_to_fuse)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("epsilon_hat", False)
        super().__init__(*args, **kwargs)
        _record(self)


_STAND_INS: dict[type, type] = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}


def _record(optimizer: torch.optim.Optimizer) -> None:
    for entry in _swaps:
        entry.replaced.append(Replaced(optimizer, type(optimizer).__name__))


def _install() -> None:
    """Give PyTorch's classes a `__new__` that chooses the class to build.

    It stays when the swap is undone, and then makes what it is asked for: Python does not restore a class whose
    `__new__` was removed, and its calls would fail for having arguments.
    """
    for original in _STAND_INS:
        if "__new__" not in original.__dict__:
            # Assigned as text names it: mypy takes `__new__` for a method that nobody replaces.
            setattr(original, "__new__", staticmethod(_chooser(original)))  # noqa: B010  # see above


def _chooser(original: Any) -> Callable[..., Any]:
    @functools.wraps(original.__init__)
    def choose(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Without arguments it is a copy or an unpickled one of PyTorch's that is made, and nobody initialises it.
        stands_in = _swaps and cls in _STAND_INS and (args or kwargs)
        return object.__new__(_STAND_INS[cls] if stands_in else cls)

    return choose
