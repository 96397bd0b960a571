"""`torch.nn` with Dragon's `Parameter`; each module class is a twin of PyTorch's. The rest is PyTorch's."""

from typing import TYPE_CHECKING, Any

import torch as _torch

from dragon.vm.torch._mirror import mirror
from dragon.vm.torch.nn import parameter as _parameter
from dragon.vm.torch.nn.twins import Module as _Module
from dragon.vm.torch.nn.twins import twin_of

if TYPE_CHECKING:
    # Editors and type checkers cannot follow `__getattr__`. They see PyTorch's own classes.
    from torch.nn import *  # noqa: F403  # all of PyTorch's names, on purpose
else:
    Module = _Module
    Parameter = _parameter.Parameter
    UninitializedParameter = _parameter.UninitializedParameter

__all__ = [name for name in dir(_torch.nn) if not name.startswith("_")]

_get_torch_attribute, __dir__ = mirror("torch.nn", globals())


def __getattr__(name: str) -> Any:
    """Return the twin of a module class of `torch.nn`, or what PyTorch has under that name."""
    value = _get_torch_attribute(name)
    if isinstance(value, type) and issubclass(value, _torch.nn.Module) and "__deprecated__" not in vars(value):
        value = twin_of(value)
        globals()[name] = value
    return value
