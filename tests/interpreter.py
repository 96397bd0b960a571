"""Triton's interpreter without the greater part of its work, which it does again and again.

A kernel's call replaces the functions of the language by interpreted ones, and puts them back at the end. Each
helper that the kernel calls has them replaced once more: it finds nothing left to replace, in 0.2 ms a call.
Each operation makes a table of all dtypes to look one up, and the type of its result with a shape of its own.
It compares shapes dimension by dimension before it broadcasts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


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


@cache
def _shape_of_type(sizes: tuple[int, ...]) -> tuple[Any, int]:
    """The shape of a type as the language keeps it, and the number of elements."""
    made = tl.block_type.__new__(tl.block_type)
    _make_type(made, tl.float32, list(sizes))
    return made.shape, made.numel


@cache
def _shape_of_tensor(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """The shape of a tensor, which has constants of the language, and the number of elements."""
    made = tl.tensor.__new__(tl.tensor)
    _make_tensor(made, None, tl.block_type(tl.float32, sizes) if sizes else tl.float32)
    return made.shape, made.numel


_make_type, _make_tensor = tl.block_type.__init__, tl.tensor.__init__


def _share_shapes() -> None:
    """Let types and tensors of one shape share it, and make the name of a type when it is asked for."""

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        self.element_ty = element_ty
        self.shape, self.numel = _shape_of_type(sizes)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shape_of_tensor(tuple(type.shape) if type.is_block() else ())

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)


def _skip_what_is_done() -> None:
    """Neither broadcast tensors of one shape nor cast to the type that is there: the usual case, in many calls."""
    broadcast, cast = TritonSemantic.broadcast_impl_value, TritonSemantic.cast

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        # Shapes are shared.
        if left.is_block() and right.is_block() and left.shape is right.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_unless_alike(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        return input if input.type.scalar is dst_ty.scalar else cast(self, input, dst_ty, fp_downcast_rounding)

    TritonSemantic.broadcast_impl_value, TritonSemantic.cast = broadcast_unless_alike, cast_unless_alike


def speed_up() -> None:
    """Let the functions of each module be replaced once in a kernel's call, and make dtypes and shapes once."""
    interpreter._get_np_dtype = _dtype_lookup()
    _share_shapes()
    _skip_what_is_done()
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
