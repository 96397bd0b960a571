"""Tensors that notice when something writes, or reaches, outside of them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

GUARD_BYTE = 0xFF  # all ones are a NaN in every floating dtype: a guard that is read poisons the result
GUARD_ELEMENTS = 64  # keeps 64-byte alignment for every dtype, and is longer than any vector access
_PROT_NONE = 0


class FenceError(AssertionError):
    """Memory outside of a fenced tensor was written."""


def _once(view: Tensor) -> Tensor:
    """Return a view with each memory location of an expanded view once, which may then be written."""
    return view[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in view.stride())]


class Fenced:
    """A tensor inside a buffer whose every other byte is a sentinel.

    An off-by-one mask survives every comparison of values; it does not survive `check`. Elements that a
    strided view skips are guarded too.

    Attributes:
        tensor: The view, elements uninitialised (NaN until they are written).
    """

    tensor: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        misalign: int = 0,
    ) -> None:
        """Allocate a buffer and the view in it.

        Args:
            shape: Shape of the view.
            strides: Strides of the view in elements, None for contiguous; non-negative.
            dtype: Dtype of the view.
            device: Where the buffer lives.
            misalign: Elements by which the view starts past a 64-byte border.

        Raises:
            ValueError: Strides of another length than the shape, or negative ones, or a negative `misalign`.
        """
        if strides is None:
            strides = torch.empty(tuple(shape), device="meta").stride()
        if len(strides) != len(shape) or min((*strides, misalign), default=0) < 0:
            raise ValueError(
                f"strides and misalign must be non-negative, one stride a dimension: shape {tuple(shape)}, "
                f"strides {tuple(strides)}, misalign {misalign}"
            )
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        span = 0 if 0 in shape else 1 + last
        numel = 2 * GUARD_ELEMENTS + misalign + span
        layout = (tuple(shape), tuple(strides), GUARD_ELEMENTS + misalign)
        self._bytes = torch.full((numel * dtype.itemsize,), GUARD_BYTE, dtype=torch.uint8, device=device)
        self._is_guard = torch.ones(numel, dtype=torch.bool, device=device)
        _once(self._is_guard.as_strided(*layout)).fill_(False)
        self._first, self._span, self._itemsize = layout[2], span, dtype.itemsize
        self.tensor = self._bytes.view(dtype).as_strided(*layout)

    @classmethod
    def like(cls, values: Tensor, *, misalign: int = 0) -> Fenced:
        """Copy a tensor, strides included, into a fence; an expanded tensor stays expanded."""
        fenced = cls(
            values.shape, strides=values.stride(), dtype=values.dtype, device=values.device, misalign=misalign
        )
        _once(fenced.tensor).copy_(_once(values.detach()))
        return fenced

    def check(self, name: str = "tensor") -> None:
        """Assert that nothing outside of the view was written.

        Args:
            name: What to call the tensor in the message.

        Raises:
            FenceError: Says how many elements were written and where the first of them lies.
        """
        damaged = (self._bytes.view(-1, self._itemsize) != GUARD_BYTE).any(dim=1) & self._is_guard
        where = damaged.nonzero().flatten().tolist()
        if not where:
            return
        offset = where[0] - self._first
        place = "between its elements"
        if offset < 0:
            place = f"{-offset} element(s) before its first"
        elif offset >= self._span:
            place = f"{offset - self._span + 1} element(s) past its last"
        raise FenceError(
            f"{name} of shape {tuple(self.tensor.shape)}, strides {tuple(self.tensor.stride())}: "
            f"{len(where)} element(s) outside of it were written, the first {place}"
        )


def protected_tensor(numel: int, dtype: torch.dtype = torch.float32, *, edge: str = "end") -> Tensor:
    """Return a zeroed CPU tensor beside a protected page: reaching past it is a segmentation fault.

    The memory lives as long as the tensor or a view of it does.

    Args:
        numel: Number of elements; 0 gives an ordinary empty tensor.
        dtype: Dtype of the elements.
        edge: "end" puts the last byte before a protected page (the start is then aligned to its element only,
            unless the size is a multiple of 16 bytes), "start" puts the first byte behind one.

    Raises:
        OSError: Not on Linux, or the pages could not be protected.
        ValueError: Another edge, or a negative `numel`.
    """
    if edge not in ("start", "end"):
        raise ValueError(f'edge must be "start" or "end", got {edge!r}')
    if numel < 0:
        raise ValueError(f"numel must not be negative, got {numel}")
    if not sys.platform.startswith("linux"):
        raise OSError(f"protected_tensor needs Linux (mmap and mprotect), this is {sys.platform}")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    page, nbytes = mmap.PAGESIZE, numel * dtype.itemsize
    inside = -(-nbytes // page) * page
    # torch.frombuffer keeps the mapping alive, and Python unmaps it when the last tensor is gone.
    mapping = mmap.mmap(-1, inside + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + page + inside):
        if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect refused to protect a page beside the tensor")
    offset = page if edge == "start" else page + inside - nbytes
    return torch.frombuffer(mapping, dtype=dtype, count=numel, offset=offset)
