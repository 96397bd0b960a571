"""`Parameter`: PyTorch's parameter as a Dragon tensor. The rest of `torch.nn.parameter` is PyTorch's."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, cast

import torch

from dragon.vm.torch._mirror import mirror
from dragon.vm.torch._overwrite import overwrite_gradients
from dragon.vm.torch.tensor_type import MirroredTensorType, Tensor, rebuild


class MirroredParameterType(MirroredTensorType, type(torch.nn.Parameter)):  # type: ignore[misc]  # no public name
    """Metaclass of `Parameter`: every `torch.nn.Parameter` is an instance of it."""


class Parameter(Tensor, torch.nn.Parameter, metaclass=MirroredParameterType):
    """A `torch.nn.Parameter` whose next backward overwrites its gradient; operations on it give a `Tensor`.

    Args:
        data: Any tensor; its memory is shared. For a type that is neither PyTorch's nor Dragon's (a DTensor)
            the result is what `torch.nn.Parameter` makes of it.
        requires_grad: Whether autograd follows it.
    """

    __module__ = "dragon.vm.torch.nn"
    __mirrors__: ClassVar[type] = torch.nn.Parameter

    def __new__(cls, data: torch.Tensor | None = None, requires_grad: bool = True) -> Parameter:
        """Make the parameter, over the memory of `data`."""
        if data is None:
            data = torch.empty(0)
        if type(data) not in (torch.Tensor, torch.nn.Parameter) and Tensor not in type(data).__mro__:
            return torch.nn.Parameter(data, requires_grad)  # type: ignore[return-value]  # the foreign type's own
        return rebuild(cls, data, requires_grad, {})  # type: ignore[return-value]  # it is of type cls

    def detach(self) -> Tensor:
        """Return a tensor that shares this memory and that autograd does not follow.

        To PyTorch's own `torch.nn.Parameter(parameter)`, which wants its argument's type back, it is a parameter.
        """
        detached = cast(Tensor, super().detach())
        if sys._getframe(1).f_code is torch.nn.Parameter.__new__.__code__:
            detached.__class__ = type(self)
        return detached

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        """Copy the values, not the gradient, as PyTorch does for its parameters."""
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                values = self.detach().clone(memory_format=torch.preserve_format)
                memo[id(self)] = type(self)(values, self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]  # memo is Any

    def __repr__(self, **contents: Any) -> str:  # type: ignore[override]  # as in Tensor
        """Show the parameter as PyTorch shows its own."""
        tensor = rebuild(Tensor, self, self.requires_grad, {})
        return "Parameter containing:\n" + Tensor.__repr__(tensor, **contents)


class UninitializedParameter(torch.nn.UninitializedParameter, Parameter):
    """A lazy module's parameter, whose shape the first batch tells; then it becomes a `Parameter`."""

    __module__ = "dragon.vm.torch.nn"
    __mirrors__: ClassVar[type] = torch.nn.UninitializedParameter
    cls_to_become = Parameter

    def __new__(cls, requires_grad: bool = True, device: Any = None, dtype: Any = None) -> UninitializedParameter:
        """Make the empty parameter."""
        parameter = torch.nn.UninitializedParameter.__new__(cls, requires_grad, device, dtype)
        overwrite_gradients(parameter)
        return parameter


Tensor._parameter_type = Parameter


def adopt_parameter(parameter: torch.Tensor | None) -> None:
    """Make a plain parameter Dragon's, in place: who shares it still shares it. Others stay as they are."""
    if type(parameter) is torch.nn.Parameter:
        parameter.__class__ = Parameter
    elif type(parameter) is torch.nn.UninitializedParameter:
        parameter.__class__ = UninitializedParameter
    else:
        return
    overwrite_gradients(parameter)


__getattr__, __dir__ = mirror("torch.nn.parameter", globals())
