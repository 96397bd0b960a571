"""The layouts in which an update may walk a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._devices import has_addresses


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in some order of the dimensions."""
    expected = 1
    if tensor.numel() == 0:
        return True
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_walk(tensor: Tensor, other: Tensor) -> bool:
    """Whether walking both memories in order meets the same elements; both dense and of one shape."""
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return tensor.numel() == 0 or all(own == its for size, own, its in strides if size > 1)


def lies_like(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor is dense and has the walk of a dense one of its shape."""
    return tensor.stride() == other.stride() or (same_walk(tensor, other) and is_dense(tensor))


def is_stray(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient must be copied before it is walked like its parameter."""
    return grad.is_conj() or grad.is_neg() or (is_dense(param) and not lies_like(grad, param))


def in_layout_of(param: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself if it lies in memory as the dense `param` does, else a copy that does."""
    is_resolved = not tensor.is_conj() and not tensor.is_neg()
    if is_resolved and tensor.shape == param.shape and lies_like(tensor, param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """The address space in which the elements lie, and there their first byte and their end."""
    space = str(tensor.device)
    if not has_addresses(tensor.device):
        space += f" {tensor.untyped_storage().data_ptr()}"
    first = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return space, first, first + (last + 1) * tensor.element_size()


def _piece_offsets(tensor: Tensor, base: int, nbytes: int) -> Tensor:
    """Offset from the address `base` of every piece of `nbytes` of every element, int64 on the CPU, in bytes."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    pieces = torch.arange(0, tensor.element_size(), nbytes, device="cpu")
    return (offsets.reshape(-1, 1) * tensor.element_size() + pieces).flatten() + tensor.data_ptr() - base


def overlapping_pair(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Find two tensors, or one, in which some element of memory stands twice.

    Returns:
        The positions of both tensors, equal for a tensor that overlaps itself; None if there are none.
    """
    spans = []
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            if not is_dense(tensor) and _overlaps(tensor):
                return index, index
            spans.append((*_span(tensor), index))
    active: list[tuple[str, int, int, int]] = []
    for span in sorted(spans):
        space, first, _, index = span
        active = [other for other in active if other[0] == space and first < other[2]]
        for other in active:
            # What was freed, as to offload it, has no memory to share.
            if _overlaps(tensors[other[3]], tensors[index]) and tensors[index].untyped_storage().size():
                return other[3], index
        active.append(span)
    return None


def _overlaps(*tensors: Tensor) -> bool:
    base = min(tensor.data_ptr() for tensor in tensors)
    # One tensor may begin within an element of another.
    sizes = (math.gcd(tensor.element_size(), tensor.data_ptr() - base) for tensor in tensors)
    nbytes = math.gcd(*sizes)
    offsets = torch.cat([_piece_offsets(tensor, base, nbytes) for tensor in tensors])
    return len(offsets.unique()) < len(offsets)
