"""`torch.compile` for Dragon tensors."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch


def accept_tensor_types() -> None:
    """Turn off a check in the compiler that refuses every tensor subclass.

    When a compiled graph runs for the first time, torch 2.13 looks whether custom operators return their own
    arguments, only to warn; on the way there it raises a TypeError for a tensor whose type it does not know. The
    check can only be turned off for the process, so this is done when somebody compiles with Dragon, not before.
    """
    config: Any = importlib.import_module("torch._functorch.config")
    if hasattr(config, "check_custom_op_aliasing"):
        config.check_custom_op_aliasing = False


@functools.wraps(torch.compile)
def compile(*args: Any, **kwargs: Any) -> Any:
    """Do what `torch.compile` does, whose arguments these are."""
    accept_tensor_types()
    return torch.compile(*args, **kwargs)


compile.__module__ = "dragon.vm.torch"
