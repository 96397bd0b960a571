"""Which backend updates which tensor, and why another one cannot."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._devices import has_float64
from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._groups.states import CounterPlace

_TRITON_DEVICES = ("cuda", "xpu")
_KERNEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot update tensors of a device; None if it can."""
    if backend == "eager" or (backend == "native" and device.type == "cpu"):
        return None
    if backend == "native":
        return f"it updates tensors on the CPU only, and a parameter is on {device}"
    if reason := why_no_kernels():
        return reason
    if device.type in _TRITON_DEVICES:
        return None if has_float64(device) else f"its kernels decide in fp64, in which {device} does not compute"
    if device.type == "cpu":
        from dragon.kernels import launch

        if launch.INTERPRETED:
            return None
    return (
        f"it needs a CUDA, ROCm or XPU device, and a parameter is on {device}; "
        "for tests on the CPU, set TRITON_INTERPRET=1 before triton is imported"
    )


@cache
def why_no_kernels() -> str | None:
    """Why there are no kernels on any device; None if there are."""
    error = _error_of_import()
    if error is None:
        return None
    if _error_of_import() is None:
        # A signal handler had raised it.
        raise error
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"kernels cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _error_of_import() -> Exception | None:
    try:
        importlib.import_module("dragon.kernels")
    # Libraries may be missing, versions differ, or a packer may have left out the sources, which triton compiles.
    except Exception as error:
        return error
    return None


def why_slow(backend: str | None, device: torch.device) -> str | None:
    """Why parameters on a GPU that kernels are made for go the eager way; None for others, and if it is wanted."""
    return why_not("triton", device) if backend is None and device.type in _TRITON_DEVICES else None


def check_backend(backend: str | None, device: torch.device) -> None:
    """Check an explicit choice.

    Raises:
        ValueError: if the backend cannot update tensors of the device, saying why.
    """
    if backend is not None and (reason := why_not(backend, device)) is not None:
        raise ValueError(f"backend={backend!r} is impossible here: {reason}")


def choose_backend(
    backend: str | None,
    param: Tensor,
    grad_dtype: torch.dtype,
    state_dtypes: set[torch.dtype],
    differentiable: bool,
    *,
    in_parts: bool = False,
) -> str:
    """The backend that updates one parameter.

    A parameter that is not dense, such as ``base[..., 0]``, is negated where it is read, or has no memory of its
    own, goes the eager way whatever the choice. The native backend computes in fp32 where states differ from the
    parameter. Else it rounds a gradient of another dtype to its parameter's; it is not chosen for one unasked.

    `backend` is the explicit choice, or None. `state_dtypes` are those of plain states. `in_parts` tells whether
    some tensor is not plain.

    Raises:
        ValueError: if an explicit choice cannot update the parameter, saying why.
    """
    if differentiable or not has_memory(param) or not is_dense(param) or param.is_neg():
        return "eager"
    check_backend(backend, param.device)
    unknown = {param.dtype, grad_dtype, *state_dtypes}.difference(_KERNEL_DTYPES)
    if backend == "triton" and unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(
            f"backend='triton' is impossible here: a parameter, its gradient or states are of {names}"
        )
    if backend is not None:
        return backend
    if param.device.type in _TRITON_DEVICES and why_not("triton", param.device) is None:
        return "eager" if unknown else "triton"
    is_mixed = in_parts or bool(state_dtypes - {param.dtype})
    is_native = param.device.type == "cpu" and not unknown and (is_mixed or grad_dtype == param.dtype)
    return "native" if is_native else "eager"


def counter_place(param: Tensor, backend: str, group: dict[str, Any]) -> CounterPlace:
    """Where a step counter lives: with its parameter for kernels, and where PyTorch's options say so.

    Beside a parameter without memory of its own, a fake one for example, its number may not be readable: there it
    lives on the CPU.
    """
    for_kernels = backend == "triton"
    on_device = for_kernels or ((group["capturable"] or group["fused"]) and has_memory(local(param)))
    return CounterPlace(param.device if on_device else torch.device("cpu"), for_kernels)
