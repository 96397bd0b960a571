"""`Tensor`: PyTorch's tensor under Dragon's rules for gradients.

The file is not called `tensor.py`, because a submodule of that name would hide the function `torch.tensor`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from dragon.vm.torch import _engine
from dragon.vm.torch._mirror import Mirrored
from dragon.vm.torch._overwrite import note_recomputation, overwrite_gradients

# Takes the function, its arguments, its keyword arguments and the type of new tensors.
_Handler = Callable[[Callable[..., Any], Sequence[Any], dict[str, Any], type], Any]


class MirroredTensorType(Mirrored, torch._C._TensorMeta):
    """Metaclass of `Tensor`: every tensor is an instance of it, as code that asks means `torch.Tensor`."""

    def __subclasscheck__(cls, subclass: type) -> bool:  # noqa: N805  # of a metaclass
        """Answer for every type of tensors but PyTorch's own: of a subclass PyTorch would take the rules first."""
        return subclass is not torch.Tensor and super().__subclasscheck__(subclass)


class Tensor(torch.Tensor, metaclass=MirroredTensorType):
    """A `torch.Tensor` whose results are Dragon tensors, with three rules of its own.

    - As a leaf, its next backward overwrites `.grad`, where PyTorch adds to it.
    - `backward()` of more than one element means a gradient of ones.
    - `x += y`, `-=`, `*=` and `/=` on a result that autograd follows rebind `x` to a new tensor of its shape and
      dtype, so that what the graph has saved stays as it was. Views are changed in place, as everywhere in
      PyTorch: `x[0] += 1` and `row = x[0]; row += 1` reach `x`.
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
            if kind is not torch.Tensor and Tensor not in kind.__mro__:
                return NotImplemented
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return _trace(func, args, kwargs, cls._result_type)
        handle: _Handler = _HANDLERS.get(func, _run)
        return handle(func, args, kwargs, cls._result_type)

    def backward(
        self,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Compute the gradients of the graph's leaves, from `gradient` or from ones of this shape."""
        if gradient is None:
            with torch._C.DisableTorchFunctionSubclass():
                gradient = torch.ones_like(self) if self.numel() != 1 else None
        _engine.backward([self], gradient, retain_graph, create_graph, inputs)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Change whether autograd follows this tensor, in place."""
        with torch._C.DisableTorchFunctionSubclass():
            super().requires_grad_(requires_grad)
        overwrite_gradients(self)
        return self

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]  # the stubs know torch.Tensor only
        """Add, into a new tensor where autograd follows this result."""
        return _rebound(self, self + other) if _rebinds(self) else super().__iadd__(other)  # type: ignore[return-value]  # see above

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[misc]  # as in __iadd__
        """Subtract, into a new tensor where autograd follows this result."""
        return _rebound(self, self - other) if _rebinds(self) else super().__isub__(other)  # type: ignore[return-value]  # as above

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc]  # as in __iadd__
        """Multiply, into a new tensor where autograd follows this result."""
        return _rebound(self, self * other) if _rebinds(self) else super().__imul__(other)  # type: ignore[return-value]  # as above

    def __itruediv__(self, other: Any) -> Tensor:  # type: ignore[misc]  # as in __iadd__
        """Divide, into a new tensor where autograd follows this result."""
        return _rebound(self, self / other) if _rebinds(self) else super().__itruediv__(other)  # type: ignore[return-value]  # as above

    @property
    def _is_param(self) -> bool:
        """Whether this is a parameter. `torch.nn.Parameter(x)` sets it where it does not know the type."""
        return torch.nn.Parameter in type(self).__mro__ or bool(vars(self).get("_is_param"))

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        if value and type(self) is Tensor:
            self.__class__ = self._parameter_type
        elif torch.nn.Parameter not in type(self).__mro__:
            # A user's type stays what it is.
            vars(self)["_is_param"] = value

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

    def __coerce_same_metadata_as_tangent__(
        self, metadata: Any, expected_type: type | None = None
    ) -> torch.Tensor | None:
        """Answer a compiled graph that expects plain gradients and is given this one."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor) if expected_type is torch.Tensor else None

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
        if not torch.is_grad_enabled() or not tensor.requires_grad or tensor.is_leaf:
            return False
        # The compiler does not say what is a view.
        return torch.compiler.is_compiling() or not tensor._is_view()


def _rebound(before: torch.Tensor, after: Any) -> Any:
    """The result that takes the place of another: of its shape and dtype, as if it were changed in place."""
    # Of a foreign operand it may be anything.
    if not isinstance(after, torch.Tensor):
        return after
    # The shape of a nested tensor cannot be read. Nothing broadcasts one.
    if not before.is_nested and after.shape != before.shape:
        raise RuntimeError(
            f"output with shape {list(before.shape)} doesn't match the broadcast shape {list(after.shape)}"
        )
    if not torch.can_cast(after.dtype, before.dtype):
        raise RuntimeError(f"result type {after.dtype} can't be cast to the desired output type {before.dtype}")
    return after.to(before.dtype)


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> Any:
    """Run an operation; its new tensors are of type `kind`."""
    note_recomputation()
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if type(result) is torch.Tensor or isinstance(result, (tuple, list)):
        _convert(result, kind, _collect_ids(args, _collect_ids(kwargs.values(), set())))
    return result


def _run_plain(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> Any:
    """Run what returns a tensor that is there already, such as `.grad`, and leave its type alone."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _set_requires_grad(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        func(*args, **kwargs)
    overwrite_gradients(args[0])


def _backward(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> None:
    _engine.backward(*args, **kwargs)


def _grad(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> Any:
    kwargs.pop("only_inputs", None)  # deprecated and without effect
    grads = _engine.grad(*args, **kwargs)
    _convert(grads, kind, _collect_ids(kwargs.values(), set()))
    return grads


_HANDLERS: dict[Any, _Handler] = {
    **dict.fromkeys(torch.overrides.get_default_nowrap_functions(), _run_plain),
    torch.Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]  # a descriptor at run time
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}


_IN_PLACE = frozenset([torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.mul_, torch.Tensor.div_])


def _convert(result: Any, kind: type, given: set[int]) -> None:
    """Give the new plain tensors in `result` the type `kind`; those with an `id` in `given` stay as they are.

    In place, because `as_subclass` would hang one more node into the graph for each operation, and would make
    a view of each result.
    """
    if type(result) is torch.Tensor:
        if id(result) not in given:
            result.__class__ = kind
    elif isinstance(result, (tuple, list)):
        for item in result:
            _convert(item, kind, given)


def _collect_ids(arguments: Iterable[Any], ids: set[int]) -> set[int]:
    for argument in arguments:
        if type(argument) is torch.Tensor:
            ids.add(id(argument))
        elif isinstance(argument, (tuple, list)):
            _collect_ids(argument, ids)
    return ids


def _trace(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> Any:
    """Run an operation for `torch.compile`, which cannot follow an assigned type; it drops the aliases."""
    if func in _IN_PLACE and _rebinds(args[0]):
        # The compiler hands over `x += y` as `x.add_(y)`, which is not the same. Python can tell them apart.
        torch._dynamo.graph_break()
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if func in _HANDLERS:
        return result
    return _traced(result, kind)


def _traced(result: Any, kind: type) -> Any:
    if type(result) is torch.Tensor:
        return result.as_subclass(kind)
    if isinstance(result, (tuple, list)):
        return type(result)(_traced(item, kind) for item in result)
    return result
