"""Build our optimizers where code asks for PyTorch's, without a change to that code."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch._compile import _disable_dynamo

from dragon.vm._words import counted
from dragon.vm.torch.optim._counterparts import OURS, options_for, own_options
from dragon.vm.torch.optim._hints import hint
from dragon.vm.torch.optim._introspection import hide_ours, show_ours, takes, with_parameters_of
from dragon.vm.torch.optim.optimizer import Optimizer


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
        self._is_counted = False
        self.counts()
        optimizer.register_step_post_hook(self._count)

    def _count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.n_steps += 1
        # Parameters that came or got their shapes since: at the report the optimizer may be gone.
        n_tensors = sum(len(group["params"]) for group in optimizer.param_groups)
        if not self._is_counted or n_tensors != self._counts[0]:
            self.counts()

    def counts(self) -> tuple[int, int]:
        """Number of tensors that it updates, and of their elements; the last known ones if it is gone."""
        optimizer = self._optimizer()
        if optimizer is not None:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            shaped = [param for param in params if not torch.nn.parameter.is_lazy(param)]
            self._is_counted = len(shaped) == len(params)
            self._counts = (len(params), sum(param.numel() for param in shaped))
        return self._counts

    def findings(self) -> str:
        """Say how much it updates, and how often it did."""
        n_tensors, n_params = self.counts()
        size = f"{counted(n_params, 'parameter')} in {counted(n_tensors, 'tensor')}"
        return f"{size}, {counted(self.n_steps, 'step')}"


class LeftAlone(NamedTuple):
    """One optimizer that stayed PyTorch's.

    Attributes:
        name: of its class, with the module.
        reason: why ours did not take its place.
    """

    name: str
    reason: str


class Swap:
    """A swap that is in force, until `undo` or the end of a ``with`` block.

    Attributes:
        options: passed to each of our optimizers.
        replaced: what was built in the place of PyTorch's optimizers since, in order.
        left_alone: what stayed PyTorch's since, in order.
        rank: of this process in `torch.distributed`, when the last optimizer was built.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.replaced: list[Replaced] = []
        self.left_alone: list[LeftAlone] = []
        self.rank = _rank()
        _check_options(options)
        with _lock:
            _install()
            _swaps.append(self)

    def undo(self) -> None:
        """Let PyTorch's classes build PyTorch's optimizers again; those already built stay ours."""
        with _lock:
            if self in _swaps:
                _swaps.remove(self)
            if not _swaps:
                _uninstall()

    def report(self) -> str:
        """Say which optimizers were replaced, and which were not and why."""
        count = f"{counted(len(self.replaced), 'optimizer')} replaced"
        lines = [count if self.replaced else "no optimizer was replaced in this process"]
        found = [(f"torch.optim.{entry.name}", entry.findings()) for entry in self.replaced]
        found += [(f"not replaced: {name}", reason) for name, reason in self.left_alone]
        for (name, text), times in Counter(found).items():
            lines.append(f"  {name}{f' ({times} times)' * (times > 1)}: {text}")
        return "\n".join(lines)

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


# Of this process, for all its threads. A thread that begins or ends one holds the lock.
_swaps: list[Swap] = []
_lock = threading.RLock()

# PyTorch's `__init__` of each class, and what is in its place.
_installed: dict[type[torch.optim.Optimizer], tuple[Callable[..., None], Callable[..., None]]] = {}


def swap(**options: Any) -> Swap:
    """Make `torch.optim.Adam`, `AdamW` and `SGD` build ours.

    The classes stay the same objects, so it does not matter who imported them when. PyTorch's own is built where
    ours refuses, where a class derived from PyTorch's is asked for, and where the script has replaced `step` or
    `zero_grad` of PyTorch's; `Swap.report` says so.

    Args:
        **options: options of `Adam` that PyTorch's lacks, such as ``state_dtype``; SGD gets those that it knows.
            A dict of dtypes may name the states of both.

    Returns:
        The swap: a context manager, with a method `undo`.

    Raises:
        TypeError: for an option that `Adam` does not know, or that PyTorch's knows.
        ValueError: for an option out of range.
    """
    return Swap(options)


def _check_options(options: dict[str, Any]) -> None:
    known = own_options()
    if unknown := sorted(set(options) - known):
        names = ", ".join(map(repr, unknown))
        raise TypeError(f"swap() got unexpected keyword arguments: {names}{hint(unknown[0], known)}")
    # The trial is on the CPU, where triton is impossible; the real parameters may be on a GPU.
    trial = {name: value for name, value in options.items() if (name, value) != ("backend", "triton")}
    dtype = torch.bfloat16 if options.get("master_weights") is not None else torch.float32
    for original in (torch.optim.Adam, torch.optim.SGD):
        param = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device="cpu"))
        OURS[original]([param], **options_for(original, trial))


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _install() -> None:
    for original in OURS:
        if original not in _installed:
            plain = original.__init__
            _installed[original] = (plain, _chooser(original, plain))
            original.__init__ = _installed[original][1]  # type: ignore[method-assign]  # until `_uninstall`
    hide_ours()


def _uninstall() -> None:
    for original, (plain, ours) in list(_installed.items()):
        # Who has wrapped it since keeps it: it calls ours, which calls PyTorch's.
        if original.__init__ is ours:
            original.__init__ = plain  # type: ignore[method-assign]  # as it was
            del _installed[original]
    show_ours()


def _chooser(original: type[torch.optim.Optimizer], plain: Callable[..., None]) -> Callable[..., None]:
    """What initialises `original` while a swap is in force."""

    @_disable_dynamo
    def init(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        # Another thread may end one meanwhile.
        swaps = tuple(_swaps)
        if not swaps:
            plain(self, *args, **kwargs)
            return
        options, reason = options_for(original, swaps[-1].options), None
        if isinstance(self, Optimizer):
            _begin_anew(self, original, args, {**options, **kwargs})
        # Ours knows options of PyTorch's other classes: its SGD has no `capturable`.
        elif type(self) is original and takes(plain, kwargs.keys() - own_options()):
            args, kwargs = _repeatable(args, kwargs)
            reason = _become_ours(self, original, args, {**options, **kwargs})
            if reason is not None:
                plain(self, *args, **kwargs)
        else:
            plain(self, *args, **kwargs)
            # AdamW's calls Adam's: the nearest of them speaks.
            if next(kind for kind in type(self).__mro__ if kind in OURS) is not original:
                return
            reason = f"it is derived from torch.optim.{original.__name__}"
        _record(self, original.__name__, reason, swaps)

    return with_parameters_of(plain, init)


def _become_ours(
    optimizer: torch.optim.Optimizer,
    original: type[torch.optim.Optimizer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    """Make ours of an object of PyTorch's class that is not initialised yet.

    If ours refuses, return the reason. The object is PyTorch's again then, and the groups are as they were.
    """
    for name in ("step", "zero_grad"):
        # Ours has its own. PyTorch wraps a replacement when it builds the first optimizer of a class.
        if not _is_pytorchs(inspect.unwrap(getattr(original, name), stop=lambda layer: not _is_pytorchs(layer))):
            return f"the script has replaced its {name}()"
    before = [(group, dict(group)) for group in _groups(args, kwargs)]
    optimizer.__class__ = OURS[original]
    try:
        optimizer.__init__(*args, **kwargs)  # type: ignore[misc]  # of another class since
    # Whatever it is, the script must go on as without the swap.
    except Exception as error:
        optimizer.__class__ = original
        optimizer.__dict__.clear()
        for group, contents in before:
            group.clear()
            group.update(contents)
        return f"ours refuses it: {type(error).__name__}: {error}"
    return None


def _is_pytorchs(function: Any) -> bool:
    """Whether PyTorch has made a function or a wrapper: all that tells are its globals."""
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch.")


def _begin_anew(
    optimizer: Optimizer, original: type[torch.optim.Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Initialise ours again, as PyTorch's allows. It stays ours: what ours refuses is an error."""
    kind = type(optimizer)
    if kind is not OURS[original]:
        name = f"torch.optim.{original.__name__}.__init__"
        raise TypeError(f"{name} cannot initialise a {kind.__module__}.{kind.__qualname__}: call its own __init__")
    optimizer.__init__(*args, **kwargs)  # type: ignore[misc]  # as a script does


def _record(optimizer: torch.optim.Optimizer, name: str, reason: str | None, swaps: tuple[Swap, ...]) -> None:
    """Tell the swaps of an optimizer: that it is ours, or the reason why it stayed PyTorch's."""
    kind = type(optimizer)
    whole = f"torch.optim.{kind.__name__}" if kind in OURS else f"{kind.__module__}.{kind.__qualname__}"
    for entry in swaps:
        if reason is None:
            entry.replaced.append(Replaced(optimizer, name))
        else:
            entry.left_alone.append(LeftAlone(whole, reason))
        entry.rank = _rank()


def _repeatable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with lists in the place of iterators, which could be read only once."""
    if args:
        args = (_listed(args[0]), *args[1:])
    elif "params" in kwargs:
        kwargs = {**kwargs, "params": _listed(kwargs["params"])}
    for group in (group for group in _groups(args, kwargs) if "params" in group):
        group["params"] = _listed(group["params"])
    return args, kwargs


def _listed(params: Any) -> Any:
    return list(params) if isinstance(params, Iterator) else params


def _groups(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups that the caller gave as dicts."""
    params = args[0] if args else kwargs.get("params")
    if isinstance(params, torch.Tensor) or not isinstance(params, Iterable):
        return []
    return [group for group in params if isinstance(group, dict)]
