"""Flattened groups: the tensors of an optimizer that may share a launch, whatever parameter group they are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Any]


class Entry(NamedTuple):
    """A tensor of a flattened group.

    Attributes:
        param: a parameter, this process's shard of one, or a flat buffer of several.
        state: its state tensors by name.
        group_index: index of its parameter group.
        position: its place in the lists of tensors that a step gathers.
    """

    param: Tensor
    state: State
    group_index: int
    position: int


class Signature(NamedTuple):
    """What tensors must have in common to share a launch.

    Attributes:
        backend: "triton", "native" or "eager".
        device: of the parameters.
        param_dtype, grad_dtype: of the tensors.
        state_keys: state tensors that the update walks, in its order, without the average.
        state_dtypes: theirs.
        ema_dtype: of the average; None if none is kept.
        counts_steps: whether the update needs a step counter.
    """

    backend: str
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_keys: tuple[str, ...]
    state_dtypes: tuple[torch.dtype, ...]
    ema_dtype: torch.dtype | None
    counts_steps: bool

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Names of all entries of a state that a step reads or writes."""
        keys = self.state_keys if self.ema_dtype is None else (*self.state_keys, "ema")
        return (*keys, "step") if self.counts_steps else keys


class FlattenedGroup(NamedTuple):
    """Tensors that share a launch, in walking order."""

    signature: Signature
    entries: list[Entry]


def flatten_groups(entries: Sequence[Entry], signatures: Sequence[Signature]) -> list[FlattenedGroup]:
    """Collect entries of one signature, in order of first appearance."""
    members: dict[Signature, list[Entry]] = {}
    for entry, signature in zip(entries, signatures, strict=True):
        members.setdefault(signature, []).append(entry)
    return [FlattenedGroup(signature, chosen) for signature, chosen in members.items()]
