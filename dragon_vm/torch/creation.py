"""PyTorch's functions that make a tensor from nothing or from foreign memory; they give Dragon tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dragon.vm.torch._overwrite import overwrite_gradients
from dragon.vm.torch.tensor_type import Tensor

NAMES = (  # noqa: SIM905  # a list of strings would take forty lines
    "arange asarray as_tensor bartlett_window blackman_window empty empty_like empty_permuted empty_strided "
    "eye from_dlpack from_numpy frombuffer full full_like hamming_window hann_window kaiser_window linspace "
    "logspace normal ones ones_like rand rand_like randint randint_like randn randn_like randperm "
    "scalar_tensor tensor tril_indices triu_indices zeros zeros_like"
).split()


def _returning_dragon_tensor(name: str) -> Callable[..., Tensor]:
    function = getattr(torch, name)

    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        if type(result) is torch.Tensor and kwargs.get("out") is not result:
            # The type of a tensor that the caller holds (`as_tensor(x)` may be `x`) is not ours to change.
            if torch.compiler.is_compiling() or any(result is given for given in (*args, *kwargs.values())):
                result = result.as_subclass(Tensor)
            else:
                result.__class__ = Tensor
        if kwargs.get("requires_grad"):
            overwrite_gradients(result)
        return result  # type: ignore[no-any-return]  # torch's function is looked up by name

    create.__module__ = "dragon.vm.torch"
    create.__name__ = create.__qualname__ = name
    return create


FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: _returning_dragon_tensor(name) for name in NAMES}
