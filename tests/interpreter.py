"""Triton's interpreter without the greater part of its work, which it does again and again.

A kernel's call replaces the functions of the language by interpreted ones, and puts them back at the end. Each
helper that the kernel calls has them replaced once more: it finds nothing left to replace, in 0.2 ms a call.
Each operation makes a table of all dtypes to look one up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
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


def speed_up() -> None:
    """Let the functions of each module be replaced once in a kernel's call, and look each dtype up once."""
    interpreter._get_np_dtype = _dtype_lookup()
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
