"""Gradients and states in the placement of their parameters.

A gradient that is `Partial` is a summand of the gradient. A pending one may not have been written yet. Both are
made whole here, before anything reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import compress, repeat
from operator import attrgetter, is_, is_not, not_
from types import NoneType
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import is_distributed, local, locals_of, ready, with_spec
from dragon.vm.torch.optim._modes import if_possible

_SPEC = attrgetter("_spec")
_LOCAL = attrgetter("_local_tensor")
_PLAIN = {Tensor, NoneType}


def ready_grad(param: Any, grad: Any) -> Any:
    """A gradient that lies as its parameter does, ready for use; the very gradient if it does already.

    A gradient with other placements is redistributed: all processes of its mesh must come here together.

    Raises:
        ValueError: for a distributed gradient of a plain parameter or the reverse, and for one on another mesh.
    """
    if is_distributed(param) != is_distributed(grad):
        raise ValueError(
            f"a parameter is {_described(param)}, but its gradient is {_described(grad)}: "
            "both must be DTensors or neither"
        )
    if not is_distributed(param):
        return ready(grad)
    if grad.device_mesh != param.device_mesh:
        raise ValueError(f"a parameter is on {param.device_mesh}, but its gradient on {grad.device_mesh}")
    return _redistributed(grad, param)


def placed_like(target: Any, value: Any) -> Any:
    """A value in the placement of a target: cut into shards, made whole, or redistributed.

    All processes of the meshes must come here together. A value that is whole must be equal on all of them.
    Target and value have one global shape. A value that lies as the target does is returned as it is.
    """
    value = _with_ready_shard(value)
    if is_distributed(value):
        if is_distributed(target) and value.device_mesh == target.device_mesh:
            return _redistributed(value, target)
        value = value.full_tensor()
    if not is_distributed(target):
        return value
    # Every process cuts its shard out of its own copy: nothing is sent.
    placed = sys.modules["torch.distributed.tensor"].distribute_tensor(
        value.to(target.device_mesh.device_type), target.device_mesh, target.placements, src_data_rank=None
    )
    return placed.to(target.device)


def lying_otherwise(params: Sequence[Any], shards: Sequence[Any]) -> list[Any]:
    """The parameters whose gradients are other memory than the shards that a step reads of them, None for none."""
    return [
        param
        for param, shard in zip(params, shards, strict=True)
        if shard is not None and local(param.grad).data_ptr() != shard.data_ptr()
    ]


class GradientPlacements:
    """Returns the shards of gradients, in the placements of certain parameters.

    In the steady state gradients come with the specs of the last step, the very objects. Each pass over the
    gradients is then in C: one for types, one for specs, one for shards and one for the types of shards. A process
    that has not imported `DTensor` pays for none. The gradients come in the order of the parameters, of which none
    is kept.

    Attributes:
        are_distributed: whether some parameter is distributed.
        are_copies: whether some of the last gradients lay otherwise: what was returned of them are copies.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._mask = bytes(map(is_distributed, params))
        self.are_distributed = any(self._mask)
        # Of parameters and their gradients. Specs hold meshes and placements, not tensors.
        self._specs = self._specs_of(params, params)
        # Those with gradients at the last step at which some had none, and their placements.
        self._part: tuple[bytes, GradientPlacements] | None = None
        self.are_copies = False

    def shards(self, params: Sequence[Tensor], grads: Sequence[Any]) -> Sequence[Any]:
        """The shard of each gradient, ready for use; the very sequence if all are plain and ready.

        There is a gradient or None for each parameter. One that lies otherwise is redistributed into a new tensor.

        Raises:
            ValueError: as `ready_grad`.
        """
        self.are_copies = False
        if not self._specs and (set(map(type, grads)) <= _PLAIN or _wrappers().isdisjoint(map(type, grads))):
            return grads
        present = bytes(map(is_not, grads, repeat(None)))
        if not all(present):
            return self._some(params, grads, present)
        if self._are_expected(params, grads):
            return locals_of(grads)
        prepared = [ready_grad(param, grad) for param, grad in zip(params, grads, strict=True)]
        if all(map(is_, prepared, grads)):
            self._specs = self._specs_of(params, grads)
        else:
            self.are_copies = True
        return locals_of(prepared)

    def _some(self, params: Sequence[Tensor], grads: Sequence[Any], present: bytes) -> list[Any]:
        chosen = list(compress(params, present))
        if self._part is None or self._part[0] != present:
            self._part = present, GradientPlacements(chosen)
        found = self._part[1].shards(chosen, list(compress(grads, present)))
        self.are_copies = self._part[1].are_copies
        shards: list[Any] = [None] * len(grads)
        for position, shard in zip(compress(range(len(grads)), present), found, strict=True):
            shards[position] = shard
        return shards

    def _specs_of(self, params: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
        return [*map(_SPEC, compress(params, self._mask)), *map(_SPEC, compress(grads, self._mask))]

    def _are_expected(self, params: Sequence[Any], grads: Sequence[Any]) -> bool:
        """Whether nothing is pending, and all tensors are distributed as they were at the last step."""
        wrappers = _wrappers()
        if not wrappers.isdisjoint(map(type, compress(grads, map(not_, self._mask)))):
            return False
        # It fails for a plain gradient.
        specs = if_possible((AttributeError,), self._specs_of, params, grads)
        if specs is None:
            return False
        pending = not wrappers.isdisjoint(map(type, map(_LOCAL, compress(grads, self._mask))))
        # Lists of the same objects are compared in C; equal objects by Python calls, this once.
        if pending or specs != self._specs:
            return False
        self._specs = specs
        return True


def _wrappers() -> set[type]:
    """The types of distributed and of pending tensors, as far as they are imported."""
    tensors = sys.modules.get("torch.distributed.tensor")
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    found = getattr(tensors, "DTensor", None), getattr(collectives, "AsyncCollectiveTensor", None)
    return set(filter(None, found))


def _redistributed(tensor: Any, target: Any) -> Any:
    """A tensor on a target's mesh in its placements, ready for use; the very tensor if it lies so."""
    is_placed = tensor.placements == target.placements
    return _with_ready_shard(tensor if is_placed else tensor.redistribute(placements=target.placements))


def _with_ready_shard(tensor: Any) -> Any:
    """A tensor whose shard no collective still fills; the very tensor if that holds."""
    shard = local(tensor)
    if not is_distributed(tensor):
        return shard
    return tensor if shard is tensor._local_tensor else with_spec(shard, tensor._spec)


def _described(tensor: Any) -> str:
    if is_distributed(tensor):
        return f"a DTensor with placements {tuple(tensor.placements)}"
    return f"a plain tensor of shape {tuple(tensor.shape)}"
