"""Optimizers without their device: what is left is the host's work, measurable where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


class Counter:
    """Stands for a kernel: counts its launches, and does nothing."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Count a launch."""
        self.n_calls += 1


@contextmanager
def no_launches() -> Iterator[Counter]:
    """Let the triton backend take tensors of any device, and its launches do nothing; counts them."""
    from dragon.kernels import launch
    from dragon.vm.torch.optim import _backend

    counter = Counter()
    kernels: dict[str, Any] = dict.fromkeys(launch.UPDATE_KERNELS, counter)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(launch.UPDATE_KERNELS, kernels))
        for name in ("advance_kernel", "norm_kernel"):
            patches.enter_context(mock.patch.object(launch, name, counter))
        patches.enter_context(mock.patch.object(_backend, "why_not", return_value=None))
        yield counter


@contextmanager
def no_operations() -> Iterator[Counter]:
    """Let the operations behind torch's fused Adam do nothing; counts them."""
    counter = Counter()
    with ExitStack() as patches:
        for name in ("_fused_adam_", "_foreach_add_"):
            patches.enter_context(mock.patch.object(torch, name, counter))
        yield counter
