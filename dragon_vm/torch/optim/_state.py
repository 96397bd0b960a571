"""State of a flattened group: flat arenas, of which each parameter's state tensors are views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._plan import arena_offsets

# Bytes of the widest access of a thread.
ALIGNMENT = 16
# Every tensor of an arena starts at a multiple of this many elements: 16 bytes of any dtype, and the same place in
# the arenas of different dtypes.
SLOT = 16


def arena_views(params: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Allocate one zeroed buffer and cut it into a view for each dense parameter, laid out as the parameter is.

    Args:
        params: dense tensors of one device and dtype.
        dtype: of the buffer; None for the parameters' own, which complex parameters always keep.
    """
    like = params[0]
    dtype = like.dtype if dtype is None or like.is_complex() else dtype
    offsets = arena_offsets([param.numel() for param in params], SLOT)
    arena = torch.zeros(offsets[-1], dtype=dtype, device=like.device)
    return [
        arena.as_strided(param.shape, param.stride(), offset)
        for param, offset in zip(params, offsets[:-1], strict=True)
    ]


def step_counters(n_counters: int, device: torch.device) -> list[Tensor]:
    """0-dim fp32 step counters, all 0, as views of one buffer."""
    return list(torch.zeros(n_counters, dtype=torch.float32, device=device).unbind())


def common_base(counters: Sequence[Tensor]) -> Tensor | None:
    """The fp32 buffer [n] of which `counters` are the elements in order, if there is one."""
    first = counters[0]
    address, itemsize = first.data_ptr(), first.element_size()
    if [counter.data_ptr() for counter in counters] != [address + i * itemsize for i in range(len(counters))]:
        return None
    start = first.storage_offset()
    if first.untyped_storage().nbytes() < (start + len(counters)) * itemsize:
        return None
    return first.as_strided((len(counters),), (1,))
