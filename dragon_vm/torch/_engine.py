"""The two ways into the autograd engine, `backward` and `grad`, for Dragon tensors.

PyTorch hands both to `__torch_function__`, within which tensors are plain for the time of the call. The engine
must not run under that: hooks, checkpointed segments that are computed again and users' own `backward` methods
work on Dragon tensors, and have to see Dragon's rules. So the engine is given what stands for the tensors,
a plain alias of each root and the gradient edge of each input, and is called as if there were no Dragon tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

Inputs = Any  # what PyTorch takes: a tensor, an edge, a sequence or a dict of them


def backward(
    tensors: Sequence[Any],
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Inputs = None,
) -> None:
    """Do what `torch.autograd.backward` does.

    Args:
        tensors: Roots, tensors or edges.
        grad_tensors: A gradient for each root, of its shape; None for ones, of a single element.
        retain_graph: Whether the graph may be walked again; None for the value of `create_graph`.
        create_graph: Whether the gradients can be differentiated.
        inputs: What gradients are accumulated into; None for all leaves.
    """
    targets = None if inputs is None else [_edge_of_leaf(tensor) for tensor in _listed(inputs)]
    with _guard(targets or []):
        torch.autograd.backward(
            [_plain_alias(tensor) for tensor in tensors], grad_tensors, retain_graph, create_graph, inputs=targets
        )


def grad(
    outputs: Sequence[Any],
    inputs: Inputs,
    *,
    create_graph: bool = False,
    materialize_grads: bool = False,
    **options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """Do what `torch.autograd.grad` does, whose arguments these are."""
    listed = _listed(inputs)
    edges, roots = [_edge(tensor) for tensor in listed], [_plain_alias(tensor) for tensor in outputs]
    with _guard(edges):
        # What is unused is allowed by now, if zeros are made of it.
        grads = torch.autograd.grad(roots, edges, create_graph=create_graph, **options)
    if not materialize_grads:
        return tuple(grads)
    return tuple(
        _zeros_like(given, create_graph) if gradient is None else gradient
        for gradient, given in zip(grads, listed, strict=True)
    )


def _zeros_like(given: torch.Tensor | GradientEdge, requires_grad: bool) -> torch.Tensor:
    if isinstance(given, GradientEdge):
        raise RuntimeError("materialize_grads cannot be used when the given input is a GradientEdge")
    return torch.zeros_like(given, requires_grad=requires_grad)


def _listed(inputs: Inputs) -> list[Any]:
    if isinstance(inputs, (torch.Tensor, GradientEdge)):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs)


def _plain_alias(tensor: Any) -> Any:
    if type(tensor) is torch.Tensor or not isinstance(tensor, torch.Tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        return tensor.as_subclass(torch.Tensor)


def _edge(tensor: Any) -> Any:
    """The edge of a tensor; without one the tensor itself, so that PyTorch's error says which it is."""
    if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(tensor)


def _edge_of_leaf(tensor: Any) -> Any:
    """The edge of a leaf; PyTorch writes the `.grad` of another tensor only where it is given the tensor."""
    return _edge(tensor) if isinstance(tensor, torch.Tensor) and tensor.is_leaf else tensor


def _guard(targets: Sequence[Any]) -> AbstractContextManager[Any]:
    """Keep PyTorch from calling back for a tensor among the targets that no edge could stand for."""
    has_tensor = any(isinstance(target, torch.Tensor) for target in targets)
    return torch._C.DisableTorchFunctionSubclass() if has_tensor else nullcontext()
