"""Whether collections still hold the very tensors that they held."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode


class _DifferentError(Exception):
    """Two tensors were compared by value: they are not the same object."""


class _NoOperations(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _DifferentError


def same_tensors(left: Any, right: Any) -> bool:
    """Whether two nested lists, dicts and tuples are equal, their tensors not in value but in identity.

    Collections ask for equality only where identity does not answer, so that one comparison of two lists, at the
    speed of C, is all it takes: the first operation on a tensor says that they differ.
    """
    try:
        with torch._C._EnableTorchFunction(), _NoOperations():
            return bool(left == right)
    except Exception:  # whatever else does not like to be compared is different too
        return False
