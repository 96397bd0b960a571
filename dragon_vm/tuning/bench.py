"""Check and time configurations of one kernel variant on one case's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant
from dragon.vm.tuning.check import STEPS_TAKEN, check_candidate, hyperparameters
from dragon.vm.tuning.scratch import Processor, Tables, allocate, nbytes_per_element
from dragon.vm.tuning.statistics import median
from dragon.vm.tuning.timer import Timer

COPY_REPETITIONS = 21

# Bytes: the scratch tensors are still there, and beyond this a copy twice as large takes twice as long.
LARGEST_COPY = 2**29


class KernelBench:
    """A `dragon.vm.tuning.search.Bench` of a device.

    Args:
        variant: which kernel.
        numels: elements of each tensor.
        device: where.
        processor: of the device.
        timer: times launches.
        verdicts: what is known of the variant's configurations; a check does not depend on the case.

    Raises:
        torch.OutOfMemoryError: if the tensors do not fit the device.
    """

    def __init__(
        self,
        variant: Variant,
        numels: Sequence[int],
        device: torch.device,
        processor: Processor,
        timer: Timer,
        verdicts: dict[LaunchConfig, str | None] | None = None,
    ) -> None:
        self._variant, self._device, self._processor, self._timer = variant, device, processor, timer
        self._verdicts = {} if verdicts is None else verdicts
        self._rows = allocate(variant, numels, device)
        self._tables = Tables(
            self._rows, variant.algorithm, hyperparameters(variant.algorithm), STEPS_TAKEN, processor
        )
        self.nbytes = nbytes_per_element(variant) * sum(numels)

    def check(self, config: LaunchConfig) -> str | None:
        """Why a configuration's result is wrong; None if it is right."""
        if config not in self._verdicts:
            self._verdicts[config] = check_candidate(self._variant, config, self._device, self._processor)
        return self._verdicts[config]

    def time_ms(self, configs: Sequence[LaunchConfig]) -> list[float]:
        """One time of each configuration; in place and on scratch memory, so a step is as good as any."""
        launches = [self._tables.launch(self._variant, config) for config in configs]
        return self._timer.time_ms(launches)

    def copy_ms(self) -> float:
        """The time of a `copy_` that reads and writes as many bytes as a launch; a very large one is scaled up."""
        n_copied = max(min(self.nbytes // 2, LARGEST_COPY), 1)
        source = torch.zeros(n_copied, dtype=torch.int8, device=self._device)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)

        return median(self._timer.time_ms([copy] * COPY_REPETITIONS)) * self.nbytes / (2 * n_copied)
