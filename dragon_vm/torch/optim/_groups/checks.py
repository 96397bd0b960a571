"""Errors for parameters and gradients that no backend may touch, raised before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._devices import has_addresses
from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._groups.layout import overlapping_pair
from dragon.vm.torch.optim._modes import if_possible

Group = Mapping[str, Any]


def names_of(group: Group) -> list[str | None]:
    """The name of each parameter of a group, or None.

    A program that changes the list of parameters leaves the names as they were. Then they are nobody's.
    """
    names, n_params = group.get("param_names") or (), len(group["params"])
    return list(names) if len(names) == n_params else [None] * n_params


def labels(groups: Sequence[Group]) -> list[str]:
    """What to call each parameter in an error: its position among all, and its name if it has one."""
    names = chain.from_iterable(map(names_of, groups))
    return [f"parameter {index}" + (f" ({name})" if name else "") for index, name in enumerate(names)]


def labels_of(params: Sequence[Tensor], groups: Sequence[Group]) -> list[str]:
    """What to call some of the parameters of all groups."""
    every = chain.from_iterable(group["params"] for group in groups)
    names: dict[int, list[str]] = {}
    for param, label in zip(every, labels(groups), strict=True):
        names.setdefault(id(param), []).append(label)
    # One that stands twice among all stands twice here.
    return [names[id(param)].pop(0) for param in params]


def check_param(param: Tensor) -> None:
    """Check the dtype and layout of a parameter that trains.

    Raises:
        ValueError: for one that is neither real nor complex floating point, not strided, or a conjugated view.
    """
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(f"params must be floating point or complex, but got one of {param.dtype}")
    if param.layout != torch.strided:
        raise ValueError(f"params must be strided, but got one of layout {param.layout}")
    if param.is_complex() and not torch.nn.parameter.is_lazy(param) and param.is_conj():
        raise ValueError("params must not be conjugated views: give resolve_conj() of it, or the tensor itself")


def check_grads(params: Sequence[Tensor], grads: Sequence[Tensor], owner: str) -> None:
    """Check that gradients can update parameters.

    Raises:
        RuntimeError: for a sparse gradient, as PyTorch.
        ValueError: for a gradient of another device, shape or kind of number than its parameter, and for a
            parameter without its memory.
    """
    for param, grad in zip(params, grads, strict=True):
        check_param(param)
        if grad.layout != torch.strided:
            raise RuntimeError(f"{owner} does not support sparse gradients, please consider SparseAdam instead")
        if grad.device != param.device:
            raise ValueError(f"a parameter is on {param.device}, but its gradient is on {grad.device}")
        if grad.shape != param.shape:
            raise ValueError(f"a parameter has shape {tuple(param.shape)}, but its gradient {tuple(grad.shape)}")
        if not are_of_one_kind(param, grad):
            raise ValueError(f"a parameter is of {param.dtype}, but its gradient is of {grad.dtype}")
        if is_freed(param):
            raise ValueError(f"a parameter of shape {tuple(param.shape)} has no memory: its storage was freed")


def are_of_one_kind(param: Tensor, value: Tensor) -> bool:
    """Whether what belongs to a parameter is real or complex floating point, as the parameter is."""
    return value.is_complex() if param.is_complex() else value.is_floating_point()


def check_state(param: Tensor, state: Mapping[str, Any], keys: Sequence[str], counts_steps: bool) -> None:
    """Check the state that a parameter has already, complete or not, whoever put it there.

    Raises:
        ValueError: for a state tensor of another shape or kind of number, and for a step that is not one number.
    """
    for key in keys:
        value = state.get(key, param)
        if not isinstance(value, Tensor) or value.shape != param.shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"a parameter has shape {tuple(param.shape)}, but its state {key!r} {found}")
        if not are_of_one_kind(param, value):
            raise ValueError(f"a parameter is of {param.dtype}, but its state {key!r} of {value.dtype}")
    step = state.get("step") if counts_steps else None
    if step is not None and not is_count(step):
        raise ValueError(f"the state 'step' of a parameter must be one number, but got {step!r}")


def is_count(step: Any) -> bool:
    """Whether a step count is one real number."""
    if isinstance(step, Tensor):
        return step.numel() == 1 and not step.is_complex()
    return hasattr(step, "__float__")


def check_memory(params: Sequence[Tensor], groups: Sequence[Group]) -> None:
    """Check that no element of memory belongs to two of the parameters of groups, or twice to one.

    Raises:
        ValueError: if one does.
    """
    shards = list(map(local, params))
    pair = overlapping_pair(shards)
    if pair is None:
        return
    first, second = sorted(pair)
    called = labels_of(params, groups)
    if first == second:
        raise ValueError(
            f"params must not share memory, but elements stand twice in {called[first]}, of shape "
            f"{tuple(shards[first].shape)} with strides {shards[first].stride()}"
        )
    raise ValueError(
        f"params must not share memory, but {called[first]} and {called[second]} do: their elements would be "
        "updated twice a step. PyTorch only warns of it; give each parameter once"
    )


def check_differentiable(group: Group, max_grad_norm: float) -> None:
    """Check that autograd sees all that decides about an update that it is to see.

    Raises:
        ValueError: for norms of gradients, which are numbers to it.
    """
    for name, limit in (("max_grad_norm", max_grad_norm), ("clip_norm", group["clip_norm"])):
        if group["differentiable"] and limit:
            raise ValueError(
                f"differentiable=True with {name}={limit}: autograd does not see the norm. Clip by "
                "torch.nn.utils.clip_grad_norm_, or leave it out"
            )


def check_trained(groups: Sequence[Group]) -> None:
    """Check that no two trained parameters of these groups share memory.

    Raises:
        ValueError: as `check_memory`.
    """
    params = chain.from_iterable(group["params"] for group in groups)
    check_memory([param for param in params if param.requires_grad and has_memory(local(param))], groups)


def is_trained(param: Tensor) -> bool:
    """Whether a parameter is updated, and has a shape by now."""
    return param.requires_grad and not torch.nn.parameter.is_lazy(param)


def has_memory(param: Tensor) -> bool:
    """Whether a parameter is a strided tensor that has memory of its own by now, or had until it was freed."""
    return (
        has_own_memory(type(param))
        and param.device.type != "meta"
        and not torch.nn.parameter.is_lazy(param)
        and param.layout == torch.strided
        # Tensors of XLA have no storage, or one without an address.
        and bool(if_possible((RuntimeError,), _has_address, param))
    )


def _has_address(param: Tensor) -> bool:
    """Whether a tensor has an address, or needs none, or had one until its memory was freed."""
    # Devices without addresses may keep numbers elsewhere than in storages, as one written in Python does.
    may_be_freed = has_addresses(param.device)
    return bool(param.data_ptr() or not param.numel() or (may_be_freed and not param.untyped_storage().size()))


def is_freed(param: Tensor) -> bool:
    """Whether a parameter has elements, but a program has taken its memory away, as to offload it."""
    # By the address: PyTorch's `DebugMode` prints a storage that it sees, byte by byte, which takes minutes.
    is_there = has_memory(param) and param.numel() > 0
    return is_there and param.data_ptr() == param.storage_offset() * param.element_size()


@cache
def has_own_memory(kind: type) -> bool:
    """Whether tensors of a type have memory of their own: not wrappers that dispatch to inner tensors."""
    return getattr(kind, "__torch_dispatch__", None) is Tensor.__torch_dispatch__
