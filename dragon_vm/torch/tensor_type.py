"""`Tensor`: PyTorch's tensor under Dragon's rules for gradients.

The file is not called `tensor.py`, because a submodule of that name would hide the function `torch.tensor`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from dragon.vm.torch._mirror import Mirrored
from dragon.vm.torch._overwrite import note_recomputation, overwrite_gradients

_RETURNS_PLAIN = torch.overrides.get_default_nowrap_functions()
_SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]  # a descriptor at run time


class MirroredTensorType(Mirrored, torch._C._TensorMeta):
    """Metaclass of `Tensor`: every tensor is an instance of it, as code that asks means `torch.Tensor`."""


class Tensor(torch.Tensor, metaclass=MirroredTensorType):
    """A `torch.Tensor` whose results are Dragon tensors, with three rules of its own.

    - As a leaf, its next backward overwrites `.grad`, where PyTorch adds to it.
    - `backward()` of more than one element means a gradient of ones.
    - `x += y`, `-=`, `*=` and `/=` on a result that autograd follows rebind `x` to a new tensor, so that what
      the graph has saved stays as it was. Views are changed in place, as everywhere in PyTorch: `x[0] += 1`
      and `row = x[0]; row += 1` reach `x`.
    """

    __module__ = "dragon.vm.torch"
    __mirrors__: ClassVar[type] = torch.Tensor
    _result_type: ClassVar[type]
    _parameter_type: ClassVar[type]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give results of a user's tensor type that type; results of a parameter are plain Dragon tensors."""
        super().__init_subclass__(**kwargs)
        cls._result_type = Tensor if torch.nn.Parameter in cls.__mro__ else cls

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` on the tensors as PyTorch would; the new tensors that it returns are Dragon's."""
        for kind in types:
            if Tensor not in kind.__mro__:
                return NotImplemented
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            given: set[int] = set()
        else:
            note_recomputation()
            given = _collect_ids(kwargs.values(), _collect_ids(args, set()))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in _RETURNS_PLAIN:
            return result
        if func == _SET_REQUIRES_GRAD:
            overwrite_gradients(args[0])
            return result
        return _convert(result, cls._result_type, given)

    def backward(
        self,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Compute the gradients of the graph's leaves, from `gradient` or from ones of this shape."""
        with torch._C.DisableTorchFunctionSubclass():
            if gradient is None and self.numel() != 1:
                gradient = torch.ones_like(self)
        # Outside of the guard: hooks and recomputed segments run in there, and see Dragon tensors.
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Change whether autograd follows this tensor, in place."""
        with torch._C.DisableTorchFunctionSubclass():
            super().requires_grad_(requires_grad)
        overwrite_gradients(self)
        return self

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]  # the stubs know torch.Tensor only
        """Add, into a new tensor where autograd follows this result."""
        return self + other if _rebinds(self) else super().__iadd__(other)  # type: ignore[return-value]  # see above

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[misc]  # as in __iadd__
        """Subtract, into a new tensor where autograd follows this result."""
        return self - other if _rebinds(self) else super().__isub__(other)  # type: ignore[return-value]  # as above

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]  # as in __iadd__
        """Multiply, into a new tensor where autograd follows this result."""
        return self * other if _rebinds(self) else super().__imul__(other)  # type: ignore[return-value]  # as above

    def __itruediv__(self, other: Any) -> Tensor:  # type: ignore[misc]  # as in __iadd__
        """Divide, into a new tensor where autograd follows this result."""
        return self / other if _rebinds(self) else super().__itruediv__(other)  # type: ignore[return-value]  # as above

    @property
    def _is_param(self) -> bool:
        """Whether this is a parameter. `torch.nn.Parameter(x)` sets it where it does not know the type."""
        return torch.nn.Parameter in type(self).__mro__

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        if value and type(self) is Tensor:
            self.__class__ = self._parameter_type
            overwrite_gradients(self)

    def __repr__(self, **contents: Any) -> str:  # type: ignore[override]  # a keyword that is PyTorch's affair
        """Show the tensor as PyTorch shows its own."""
        with torch._C.DisableTorchFunctionSubclass():
            text = str(super().__repr__(**contents))  # type: ignore[no-untyped-call]  # as in PyTorch
        return "tensor(" + text.removeprefix("Tensor(") if text.startswith("Tensor(") else text

    def __format__(self, format_spec: str) -> str:
        """Format a 0-dim tensor as its number: PyTorch does so for its own type only."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.dim() == 0 and not self.is_meta:
                return str(self.item().__format__(format_spec))
        return object.__format__(self, format_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy a leaf with its gradient; tensors that share memory share it in the copy too.

        Raises:
            RuntimeError: It is not a leaf (PyTorch's error).
        """
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]  # memo is Any
        with torch._C.DisableTorchFunctionSubclass():
            if not self.is_leaf:
                raise RuntimeError(
                    "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                    "protocol at the moment."
                )
            plain = copy.deepcopy(self.detach(), memo)
            copied = rebuild(type(self), plain, self.requires_grad, copy.deepcopy(self.__dict__, memo))
            if self.grad is not None:
                copied.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the type, PyTorch's plain tensor, the flag and what the user has set on it."""
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.hooks.warn_if_has_hooks(self)
            return rebuild, (type(self), self.detach(), self.requires_grad, dict(self.__dict__))


Tensor._result_type = Tensor


def rebuild(kind: type[Tensor], plain: torch.Tensor, requires_grad: bool, state: dict[str, Any]) -> Tensor:
    """Make a Dragon tensor over the memory of a plain one: the inverse of `Tensor.__reduce_ex__`.

    Args:
        kind: `Tensor` or one of its subclasses.
        plain: A `torch.Tensor` without history.
        requires_grad: Whether autograd follows the result.
        state: Attributes that were set on the tensor.
    """
    tensor: Tensor = torch.Tensor._make_subclass(kind, plain, requires_grad)
    tensor.__dict__.update(state)
    overwrite_gradients(tensor)
    return tensor


def _rebinds(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.is_grad_enabled() and tensor.requires_grad and not tensor.is_leaf and not tensor._is_view()


def _convert(result: Any, kind: type, given: set[int]) -> Any:
    """Give the new plain tensors in `result` the type `kind`; those with an `id` in `given` stay as they are.

    In place, because `as_subclass` would hang one more node into the graph for each operation, and would make
    a view of each result. The compiler cannot follow the assignment, and drops that node anyway.
    """
    compiling = torch.compiler.is_compiling()
    if type(result) is torch.Tensor:
        if compiling:
            return result.as_subclass(kind)
        if id(result) not in given:
            result.__class__ = kind
        return result
    if isinstance(result, (tuple, list)):
        converted = [_convert(item, kind, given) for item in result]
        return type(result)(converted) if compiling else result
    return result


def _collect_ids(arguments: Iterable[Any], ids: set[int]) -> set[int]:
    for argument in arguments:
        if type(argument) is torch.Tensor:
            ids.add(id(argument))
        elif isinstance(argument, (tuple, list)):
            _collect_ids(argument, ids)
    return ids
