"""The modes of PyTorch in which updates run, and in which states are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch._C import _disabled_torch_function_impl as without_torch_function
from torch._C import _set_grad_enabled as set_grad_enabled

T = TypeVar("T")


def undisturbed(update: Callable[..., None], *args: Any, with_grad: bool = False) -> None:
    """Call `update` with gradients off, unless `with_grad`, and subclasses' `__torch_function__` off.

    Both are left as they were.
    """
    enabled = torch.is_grad_enabled()
    try:
        try:
            set_grad_enabled(enabled and with_grad)
            without_torch_function(update, (), args, {})
        finally:
            set_grad_enabled(enabled)
    finally:
        # Once more: an interrupt may have hit the line above.
        set_grad_enabled(enabled)


def with_plain_tensors(run: Callable[[], T]) -> T:
    """Call `run` such that tensors it makes can be written to later, whatever mode that is in.

    They are PyTorch's own, also where it makes them of a subclass: who loads a checkpoint may not know that one.
    """
    if not torch.is_inference_mode_enabled():
        made: T = without_torch_function(run, (), (), {})
        return made
    with torch.inference_mode(False), torch.no_grad():
        made = without_torch_function(run, (), (), {})
    return made


def check_transforms() -> None:
    """Check that tensors which are made now have memory.

    Raises:
        RuntimeError: within a transform of `torch.func` that wraps them. The states would be wrapped too.
    """
    made = torch.ones(1, dtype=torch.float32, device="cpu")
    if type(made) is torch.Tensor and not if_possible((RuntimeError,), made.data_ptr):
        raise RuntimeError(
            "step() cannot be prepared within torch.func.grad, vjp, jvp or functionalize, which wrap the states "
            "that it makes: call it outside"
        )


def uncast(run: Callable[[], T]) -> T:
    """Call `run`, which joins tensors on the CPU, with autocast off there.

    Autocast refuses to join tensors of another narrow dtype than its own.
    """
    if not torch.is_autocast_enabled("cpu"):
        return run()

    def run_without() -> T:
        torch.set_autocast_enabled("cpu", False)
        return run()

    return restoring(partial(torch.set_autocast_enabled, "cpu", True), run_without)


def if_possible(errors: tuple[type[Exception], ...], read: Callable[..., T], *arguments: object) -> T | None:
    """What a function returns; None if it raises one of these errors."""
    try:
        return read(*arguments)
    except errors:
        # Once more: a signal handler may have raised it.
        try:
            read(*arguments)
        except errors:
            return None
        raise


def restoring(restore: Callable[[], object], run: Callable[[], T]) -> T:
    """Call `run`, and whatever happens then `restore`."""
    try:
        try:
            return run()
        finally:
            restore()
    finally:
        # Once more: an interrupt may have hit the line above.
        restore()
