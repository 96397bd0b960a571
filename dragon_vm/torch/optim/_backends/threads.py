"""Run a fused CPU operation on the calling thread alone, unseen by other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import repeat
from typing import Any

import torch

from dragon.vm.torch.optim._modes import if_possible, restoring

try:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # it has no types
except ImportError:  # small tensors then take as long as with PyTorch
    ThreadpoolController = None


@cache
def _openmp_pools() -> list[Any]:
    """The OpenMP libraries of this process; how many threads one uses is a setting of the calling thread."""
    if ThreadpoolController is None:
        return []
    # Windows may refuse to list them, and where a list is doubtful a warning says so, which may be an error.
    controller: Any = if_possible((OSError, Warning), ThreadpoolController)
    return [] if controller is None else list(controller.select(user_api="openmp").lib_controllers)


def on_one_thread(run: Callable[[], None]) -> None:
    """Call `run` while operations that this thread starts use this thread only.

    `torch.set_num_threads` would be seen by threads that start meanwhile, and stay with them.
    """
    if torch.get_num_threads() == 1:
        run()
        return
    pools = _openmp_pools()
    limits = [pool.num_threads for pool in pools]

    def limit_to(limits: Iterable[int]) -> None:
        for pool, limit in zip(pools, limits, strict=False):
            pool.set_num_threads(limit)

    def run_alone() -> None:
        limit_to(repeat(1))
        run()

    restoring(partial(limit_to, limits), run_alone)
