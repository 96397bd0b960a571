"""What programs find that look into constructors, and for subclasses of PyTorch's optimizers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


def takes(init: Callable[..., None], names: Iterable[str]) -> bool:
    """Whether a constructor takes keyword arguments of these names."""
    parameters = inspect.signature(init).parameters
    is_open = any(param.kind is param.VAR_KEYWORD for param in parameters.values())
    return is_open or parameters.keys() >= set(names)


def with_parameters_of(init: Callable[..., None], call: Callable[..., None]) -> Callable[..., None]:
    """A function that calls `call`, and has the parameters of `init` in its code too.

    Args:
        init: a constructor.
        call: gets ``self`` by position and the rest by keyword, without defaults. If `init` takes ``*args``, it
            gets everything as it comes.
    """
    # Programs that pass on only the options that a constructor knows look for them in its `__code__`, or ask
    # `inspect.getfullargspec`. Neither looks through wrappers: they would leave out all, the learning rate too.
    signature = inspect.signature(init)
    first, *rest = signature.parameters.values()
    if inspect.Parameter.VAR_POSITIONAL in {first.kind, *(param.kind for param in rest)}:
        return functools.wraps(init)(call)
    defaults = {param.name: param.default for param in rest if param.default is not param.empty}

    def hand_over(self: object, /, **options: object) -> None:
        call(self, **{name: value for name, value in options.items() if value is not defaults.get(name, options)})

    params = [
        # Defaults are set below: not each of them can be written as text.
        param.replace(annotation=param.empty, default=param.empty)
        for param in (first, *rest)
        if param.kind is not param.VAR_KEYWORD
    ]
    others = inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD)
    head = str(inspect.Signature([*params, others]))[1:-1]
    handed = ", ".join([first.name, *(f"{param.name}={param.name}" for param in params[1:]), "**others"])
    # By the name of its module, a warning sees that the function is no part of the user's program.
    names = {"hand_over": hand_over, "__name__": __name__}
    function: Callable[..., None] = eval(f"lambda {head}: hand_over({handed})", names)
    positional = [param.name for param in params if param.kind is not param.KEYWORD_ONLY]
    function.__defaults__ = tuple(defaults[name] for name in positional if name in defaults)
    function.__kwdefaults__ = {name: value for name, value in defaults.items() if name not in positional}
    function = functools.wraps(init)(function)
    function.__signature__ = signature  # type: ignore[attr-defined]  # of any function
    return function


def _without_ours(cls: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for kind in type.__subclasses__(cls):
        found += _without_ours(kind) if kind.__module__.startswith(f"{__package__}.") else [kind]
    return list(dict.fromkeys(found))


_hiding = classmethod(_without_ours)


def hide_ours() -> None:
    """Leave our classes out of ``__subclasses__`` of PyTorch's; those derived from ours take their places.

    Programs find PyTorch's optimizers by their names in it, and two classes of one name are an error to them.
    """
    torch.optim.Optimizer.__subclasses__ = _hiding  # type: ignore[method-assign,assignment]  # until `show_ours`


def show_ours() -> None:
    """Undo `hide_ours`."""
    if vars(torch.optim.Optimizer).get("__subclasses__") is _hiding:
        del torch.optim.Optimizer.__subclasses__
