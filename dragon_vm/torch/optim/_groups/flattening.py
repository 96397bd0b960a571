"""Flattened groups: the tensors of an optimizer that may share a launch, whatever parameter group they are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.bound import can_exceed_bound
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.rounding import Plain
from dragon.vm.torch.optim._groups.buffers import Joined
from dragon.vm.torch.optim._groups.states import State


class Entry(NamedTuple):
    """A tensor of a flattened group.

    Attributes:
        param: a parameter, or this process's shard of one.
        state: its state tensors by name.
        group_index: index of its parameter group.
        position: its place in the lists of tensors that a step gathers.
        first: global index of the tensor's first element, in walking order.
    """

    param: Tensor
    state: State
    group_index: int
    position: int
    first: int = 0

    @property
    def stream(self) -> int:
        """The number that keeps its random words apart from those of other tensors."""
        return int(self.state.get("stream", 0))


class Signature(NamedTuple):
    """What tensors must have in common to share a launch.

    Attributes:
        backend: "triton", "native" or "eager".
        device: of the parameters.
        param_dtype, grad_dtype: of the tensors.
        state_keys: states that the update walks, in its order, without the average.
        state_formats: how they are stored.
        ema_dtype: of the average; None if none is kept.
        counts_steps: whether the update needs a step counter.
        param_format: how the parameter is stored; None for its own tensor alone.
    """

    backend: str
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_keys: tuple[str, ...]
    state_formats: tuple[Format, ...]
    ema_dtype: torch.dtype | None
    counts_steps: bool
    param_format: Format | None = None

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the parameter and of the states."""
        return (self.param_format or Plain(self.param_dtype), *self.state_formats)

    @property
    def is_plain(self) -> bool:
        """Whether every tensor is rounded to nearest in some dtype, without a master."""
        return all(isinstance(form, Plain) for form in self.formats)

    @property
    def is_uniform(self) -> bool:
        """Whether all tensors but the gradient have the parameter's dtype."""
        own = Plain(self.param_dtype)
        return self.ema_dtype in (None, self.param_dtype) and all(form == own for form in self.formats)

    @property
    def is_narrowed(self) -> bool:
        """Whether some tensor is stored in less than the parameter's dtype, or beside a master."""
        return any(
            not isinstance(form, Plain) or form.dtype.itemsize < self.param_dtype.itemsize for form in self.formats
        )

    @property
    def is_bounded(self) -> bool:
        """Whether the first moment is clamped to what the second one allows: see `can_exceed_bound`."""
        return self.param_dtype != torch.float64 and can_exceed_bound(self.state_formats)

    @property
    def is_stochastic(self) -> bool:
        """Whether a step needs random words."""
        return any(form.stochastic for form in self.formats)

    @property
    def part_keys(self) -> tuple[tuple[str, ...], ...]:
        """For the parameter and each state, the names in a state of the tensors that hold it."""
        names = ("param", *self.state_keys)
        return tuple(
            tuple(name + part.suffix for part in form.parts)
            for name, form in zip(names, self.formats, strict=True)
        )

    @property
    def tensor_keys(self) -> tuple[str, ...]:
        """Names of all tensors of a state that a step reads or writes, but for the counter."""
        own, *states = self.part_keys
        keys = (*(key for parts in states for key in parts), *own[1:])
        return keys if self.ema_dtype is None else (*keys, "ema")

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Names of all entries of a state that a step reads or writes."""
        return (*self.tensor_keys, "step") if self.counts_steps else self.tensor_keys


class FlattenedGroup(NamedTuple):
    """Tensors that share a launch, in walking order.

    Attributes:
        joined: flat buffers in which some of them lie, with their places among the entries.
    """

    signature: Signature
    entries: list[Entry]
    joined: Sequence[Joined] = ()

    @property
    def hands_on(self) -> bool:
        """Whether a plan hands its states on, wherever they lie: kernels know addresses, masters their place."""
        return self.signature.backend != "triton" and self.signature.is_plain and not self.joined
