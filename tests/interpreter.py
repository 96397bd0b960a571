"""Triton's interpreter without the greater part of its work, which it does again and again.

A kernel's call replaces the functions of the language by interpreted ones, and puts them back at the end. Each
helper that the kernel calls has them replaced once more: it finds nothing left to replace, in 0.2 ms a call.
Each operation makes a table of all dtypes to look one up, and the type of its result with a shape of its own.
It compares types and shapes step by step, to convert and to broadcast nothing, and makes each constant anew.
Whatever it makes it measures, to see that its data are as wide as its type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter, jit


class _Scope:
    """What puts the functions back that were replaced, if any were."""

    def __init__(self, replaced: set[frozenset[str]], scope: Any = None) -> None:
        self._replaced, self._scope = replaced, scope

    def restore(self) -> None:
        self._replaced.clear()
        if self._scope is not None:
            self._scope.restore()


@cache
def _modules_of(fn: Callable[..., Any]) -> frozenset[str]:
    """The modules whose functions triton replaces for a function: those that it sees."""
    values = list(fn.__globals__.values())
    return frozenset(module.__name__ for module in (tl, tl.core) if any(value is module for value in values))


def _dtype_lookup() -> Callable[[Any], Any]:
    """NumPy's dtype of each of triton's, as the interpreter looks it up."""
    look_up = interpreter._get_np_dtype
    of_scalars, of_pointers = cache(look_up), look_up(tl.pointer_type(tl.float32))

    def dtype_of(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        # Types of pointers and blocks have no hash.
        return of_pointers if isinstance(element, tl.pointer_type) else of_scalars(element)

    return dtype_of


class _Shape(NamedTuple):
    """The shape of a type and of a tensor, which has constants of the language, and their numbers of elements."""

    of_type: Any
    numel_of_type: Any
    of_tensor: Any
    numel_of_tensor: Any
    numpy: tuple[int, ...]


def _share_shapes() -> None:
    """Let types and tensors of one shape share it, and make the name of a type when it is asked for."""
    init_type, init_tensor = tl.block_type.__init__, tl.tensor.__init__
    by_sizes: dict[tuple[int, ...], _Shape] = {}
    by_identity: dict[int, _Shape] = {}

    def shape_of(sizes: tuple[int, ...]) -> _Shape:
        kind, made = tl.block_type.__new__(tl.block_type), tl.tensor.__new__(tl.tensor)
        init_type(kind, tl.float32, list(sizes))
        init_tensor(made, None, kind)
        return _Shape(kind.shape, kind.numel, made.shape, made.numel, sizes)

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        shared = by_identity.get(id(shape))
        if shared is None:
            sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
            if sizes not in by_sizes:
                by_sizes[sizes] = shape_of(sizes)
            shared = by_sizes[sizes]
            by_identity[id(shared.of_type)] = by_identity[id(shared.of_tensor)] = shared
        self.element_ty, self.shared = element_ty, shared
        self.shape, self.numel = shared.of_type, shared.numel_of_type

    scalar = tl.tensor.__new__(tl.tensor)
    init_tensor(scalar, None, tl.float32)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type = handle, type
        if type.is_block():
            self.dtype, shared = type.element_ty, type.shared
            self.shape, self.numel = shared.of_tensor, shared.numel_of_tensor
        else:
            self.dtype, self.shape, self.numel = type, scalar.shape, scalar.numel

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)


# By identity, for the hash of a type takes longer: types of numbers of which each computes in itself, whatever the
# operation, those that move a pointer, and pairs of which one is made of the other as NumPy does.
_ARITHMETIC = set(map(id, (tl.float32, tl.float64, tl.int32, tl.int64, tl.uint32, tl.uint64)))
_OFFSETS = {id(tl.int32), id(tl.int64)}
_CASTS = {
    (id(source), id(target))
    for source, target in ((tl.int32, tl.int64), (tl.float32, tl.float64), (tl.float64, tl.float32))
}


# Of these none holds a constant of the language.
_NO_CONSTANTS = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, NoneType}


def _with_constants(check: Callable[..., Any]) -> Callable[..., Any]:
    """Check operands of which one may be a number, and make each number's tensor of a type and shape once."""
    constants: dict[tuple[Any, ...], Any] = {}

    def check_number(self: Any, lhs: Any, rhs: Any, *moves: bool) -> Any:
        is_right = type(lhs) is tl.tensor
        tensor, number = (lhs, rhs) if is_right else (rhs, lhs)
        if type(tensor) is not tl.tensor or type(number) not in (int, float):
            return check(self, lhs, rhs, *moves)
        dtype = tensor.dtype
        # How far to move a pointer does not depend on what it points to.
        is_pointer = isinstance(dtype, tl.pointer_type)
        if not (moves if is_pointer else id(dtype) in _ARITHMETIC):
            return check(self, lhs, rhs, *moves)
        # Zeros of both signs are equal.
        key = repr(number), is_pointer or id(dtype), id(tensor.shape)
        if key not in constants:
            operands = check(self, lhs, rhs, *moves)
            if operands[not is_right] is not tensor:
                return operands
            constants[key] = operands[is_right]
        return (tensor, constants[key]) if is_right else (constants[key], tensor)

    return check_number


def _skip_what_is_done() -> None:
    """Neither check, convert nor broadcast operands that are alike, and make each constant once."""
    broadcast, cast = TritonSemantic.broadcast_impl_value, TritonSemantic.cast
    check, unwrap = TritonSemantic.binary_op_type_checking_impl, tl.core._unwrap_if_constexpr
    check_number = _with_constants(check)

    def spread(self: Any, scalar: Any, kind: Any) -> Any:
        data = np.full(kind.shared.numpy, scalar.handle.data, scalar.handle.data.dtype)
        return self.tensor(interpreter.TensorHandle(data, scalar.dtype), kind.with_element_ty(scalar.dtype))

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        # Shapes are shared.
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if not rhs.type.is_block():
            return lhs, spread(self, rhs, lhs.type)
        if not lhs.type.is_block():
            return spread(self, lhs, rhs.type), rhs
        return broadcast(self, lhs, rhs)

    def cast_unless_alike(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        source, target = input.dtype, dst_ty.scalar
        if source is target:
            return input
        if (id(source), id(target)) in _CASTS and fp_downcast_rounding is None:
            kind = input.type.with_element_ty(target) if input.type.is_block() else target
            return self.tensor(self.builder.cast_impl(input.handle, kind), kind)
        return cast(self, input, dst_ty, fp_downcast_rounding)

    def check_unless_alike(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if type(rhs) is not tl.tensor or type(lhs) is not tl.tensor:
            if kwargs or args not in ((), (True, True)):
                return check(self, lhs, rhs, *args, **kwargs)
            return check_number(self, lhs, rhs, *args)
        left, right = lhs.dtype, rhs.dtype
        if isinstance(left, tl.pointer_type):
            # A pointer and how far to move it.
            is_done = args == (True, True) and id(right) in _OFFSETS
        else:
            is_done = left is right and id(left) in _ARITHMETIC
        return broadcast_unless_alike(self, lhs, rhs) if is_done else check(self, lhs, rhs, *args, **kwargs)

    def unwrap_by_type(value: Any) -> Any:
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in _NO_CONSTANTS else unwrap(value)

    def call(self: Any, *args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return self.fn(*map(unwrap_by_type, args), **{name: unwrap_by_type(kwargs[name]) for name in kwargs})

    jit.ConstexprFunction.__call__ = call
    TritonSemantic.broadcast_impl_value, TritonSemantic.cast = broadcast_unless_alike, cast_unless_alike
    TritonSemantic.binary_op_type_checking_impl = check_unless_alike
    tl.core._unwrap_if_constexpr = unwrap_by_type


def _keep_replacements() -> None:
    """Make the interpreted functions of each module and class once, without a check of what they are given."""
    semantic = interpreter.interpreter_semantic
    kept: dict[Any, list[tuple[str, Any]]] = {}

    def interpreted(member: Any) -> Any:
        inner = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        return call

    def replace_all(module: Any, builder: Any, scope: Any) -> None:
        if module not in kept:
            found = inspect.getmembers(module, tl.core.is_builtin)
            kept[module] = [(name, interpreted(member)) for name, member in found]
        for name, function in kept[module]:
            scope.set_attr(module, name, function)

    interpreter._patch_builtin = replace_all


@cache
def speed_up() -> None:
    """Let the functions of each module be replaced once in a kernel's call, and make dtypes and shapes once."""
    interpreter._get_np_dtype = _dtype_lookup()
    _share_shapes()
    _skip_what_is_done()
    # What checks that a handle's data are as wide as its type.
    interpreter.TensorHandle.__post_init__ = lambda self: None
    _keep_replacements()
    replace: Callable[[Any], Any] = interpreter._patch_lang
    replaced: set[frozenset[str]] = set()

    def once(fn: Callable[..., Any]) -> _Scope:
        modules = _modules_of(fn)
        if modules in replaced:
            return _Scope(replaced)
        scope = replace(fn)
        replaced.add(modules)
        return _Scope(replaced, scope)

    interpreter._patch_lang = once
