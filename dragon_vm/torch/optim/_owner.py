"""What a step knows of the optimizer it belongs to."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor

from dragon.vm.torch.optim._flat import FlatBuffer
from dragon.vm.torch.optim._options import Settings


class Owner(Protocol):
    """The part of an optimizer that a step reads, and where it leaves what it finds."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _algorithm: str
    _settings: Settings
    _buffers: list[FlatBuffer]
    # By device, what the triton backend shares between steps.
    _contexts: dict[torch.device, Any]
    _grad_norm: Tensor | None
    _n_skipped: int

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]: ...

    def _counts_steps(self, group: dict[str, Any]) -> bool: ...

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]: ...

    def _publish(self, group: dict[str, Any]) -> None: ...
