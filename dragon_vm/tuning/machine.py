"""The present GPU, as far as tuning and its results are concerned."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dragon.vm.tuning.identity import arch_name
from dragon.vm.tuning.scratch import Processor


class Machine(NamedTuple):
    """A GPU.

    Attributes:
        device: for torch.
        name: as the driver calls it.
        arch: as in "sm_90".
        processor: what a launch must know.
    """

    device: torch.device
    name: str
    arch: str
    processor: Processor


def present_gpu() -> Machine | None:
    """The current CUDA or ROCm device, None if there is none."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"{properties.major}{properties.minor}"
    processor = Processor(properties.multi_processor_count, properties.warp_size)
    return Machine(torch.device("cuda", index), properties.name, arch_name(arch), processor)
