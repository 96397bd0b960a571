"""The local shards of distributed tensors: the part of a `DTensor` that this process updates."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from itertools import repeat
from math import prod
from typing import Any

from torch import Size, Tensor


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is a `DTensor`, without importing the module that defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_distributed_type(kind: type) -> bool:
    """Whether tensors of a type are distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def ready(tensor: Any) -> Any:
    """The result of a collective that may still run, waited for in stream order; anything else as it is."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    is_pending = module is not None and isinstance(tensor, module.AsyncCollectiveTensor)
    return tensor.trigger_wait() if is_pending else tensor


def local(tensor: Any) -> Any:
    """The shard of a `DTensor` in this process, ready for use; anything else as it is.

    A tensor that a collective still fills is waited for. On an accelerator the stream waits, not the host.
    """
    return ready(tensor._local_tensor if is_distributed(tensor) else tensor)


def mean_shard_nbytes(tensor: Any) -> float:
    """Bytes of a tensor's shard in the mean over its shards: the same on all processes, even if shards are not."""
    return float(tensor.numel() * tensor.element_size()) / (n_shards(tensor) if is_distributed(tensor) else 1)


def n_shards(tensor: Any) -> int:
    """The number of shards of a `DTensor`. FSDP2 beside tensor parallelism has shards that are no `Shard`."""
    cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return prod(map(tensor.device_mesh.size, cut))


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """The shards of tensors that are ready; plain tensors and None as they are. One pass in C."""
    return list(map(getattr, tensors, repeat("_local_tensor"), tensors))


def specs_of(tensors: Sequence[Any]) -> list[Any]:
    """The meshes and placements of distributed tensors, None for plain ones. One pass in C."""
    return list(map(getattr, tensors, repeat("_spec"), repeat(None)))


def distributed_like(param: Any, shard: Tensor, shape: Size | None = None) -> Tensor:
    """A tensor for this process's part of `param`, as a `DTensor` if `param` is one.

    Args:
        param: gives mesh and placements, and global shape and strides if `shape` is None.
        shard: of the shape of the parameter's shard unless `shape` is given. The result shares its memory.
        shape: of two dimensions, for a contiguous tensor that is distributed as the parameter.

    Raises:
        ValueError: for a shard of another shape, or one that does not begin with its storage. PyTorch saves and
            copies a `DTensor` as if its storage offset held for the global tensor.
    """
    if not is_distributed(param):
        return shard
    if shape is None and shard.shape != param._local_tensor.shape:
        raise ValueError(
            f"a shard must have shape {tuple(param._local_tensor.shape)}, but got {tuple(shard.shape)}"
        )
    if shard.storage_offset():
        raise ValueError(f"a shard must have storage offset 0, but got {shard.storage_offset()}")
    spec = param._spec
    meta = spec.tensor_meta._replace(dtype=shard.dtype)
    if shape is not None:
        meta = meta._replace(shape=shape, stride=(shape[1], 1))
    if meta != spec.tensor_meta:
        spec = copy.copy(spec)
        spec.tensor_meta = meta
    return with_spec(shard, spec)


def with_spec(shard: Tensor, spec: Any) -> Tensor:
    """A `DTensor`: `from_local` would move the shard of an offloaded parameter to the device of its mesh."""
    distributed: Tensor = sys.modules["torch.distributed.tensor"].DTensor(shard, spec, requires_grad=False)
    return distributed
