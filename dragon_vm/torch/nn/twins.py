"""Twins: PyTorch's module classes, as subclasses whose parameters are Dragon's.

A twin runs PyTorch's own code. It differs in one point: each parameter it owns is a `Parameter` of Dragon,
whoever made it: its constructor, the modules it builds inside of itself, or somebody later. Modules that the
caller hands in keep what they have.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from typing import Any, ClassVar, cast

import torch

from dragon.vm.torch._compiler import accept_tensor_types
from dragon.vm.torch._mirror import Mirrored
from dragon.vm.torch.nn.parameter import adopt_parameter

# They hold what the caller hands in, and build nothing.
_CONTAINERS = (
    torch.nn.Sequential,
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.ParameterList,
    torch.nn.ParameterDict,
)


class TwinType(Mirrored, ABCMeta):
    """Metaclass of the twins: PyTorch's plain modules are instances of them.

    An `ABCMeta`, so that a user's module may be an abstract class as well.
    """


class Module(torch.nn.Module, metaclass=TwinType):
    """A `torch.nn.Module` whose own parameters are Dragon's."""

    __module__ = "dragon.vm.torch.nn"
    __mirrors__: ClassVar[type] = torch.nn.Module

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Add a parameter; a plain one becomes Dragon's, in place. Assigning an attribute comes here too."""
        super().register_parameter(name, param)
        adopt_parameter(self._parameters[name])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `forward` in place, as PyTorch does."""
        accept_tensor_types()
        super().compile(*args, **kwargs)


_twins: dict[type[torch.nn.Module], type[Module]] = {torch.nn.Module: Module}


def twin_of(real: type[torch.nn.Module]) -> type[Module]:
    """Return the twin of a class in `torch.nn`; the same one each time."""
    if real not in _twins:
        namespace: dict[str, Any] = {
            "__module__": "dragon.vm.torch.nn",
            "__doc__": real.__doc__,
            "__mirrors__": real,
        }
        if not issubclass(real, _CONTAINERS):
            namespace["__init__"] = _adopting_constructor(real)
        if getattr(real, "cls_to_become", None) is not None:  # what a lazy module is after its first batch
            namespace["cls_to_become"] = twin_of(cast(Any, real).cls_to_become)
        _twins[real] = cast(type[Module], TwinType(real.__name__, (real, Module), namespace))
    return _twins[real]


def _adopting_constructor(real: type[torch.nn.Module]) -> Any:
    construct = cast(Any, real).__init__

    @functools.wraps(construct)
    def construct_and_adopt(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        handed_in = {
            module
            for argument in (*args, *kwargs.values())
            if isinstance(argument, torch.nn.Module)
            for module in argument.modules()
        }
        for module in self.modules():
            if module is not self and module not in handed_in:
                _adopt_module(module)

    return construct_and_adopt


def _adopt_module(module: torch.nn.Module) -> None:
    real = type(module)
    if getattr(torch.nn, real.__name__, None) is real:
        module.__class__ = twin_of(real)
    for parameter in module._parameters.values():
        adopt_parameter(parameter)
