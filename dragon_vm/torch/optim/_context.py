"""What the triton backend knows and keeps of one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dragon.kernels import table


class DeviceContext:
    """What all flattened groups of one optimizer on one device share.

    Attributes:
        status: float64 [STATUS_COLUMNS], written by the kernels and read only on request.
        one, zero: fp32 [1], the grad_scale and found_inf of a step without a scaler.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.status = torch.zeros(int(table.STATUS_COLUMNS), dtype=torch.float64, device=device)
        self.spare_status = torch.zeros_like(self.status)
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        self._guard: Any = {"cuda": torch.cuda.device, "xpu": torch.xpu.device}.get(device.type)
        self.name, self.arch, self.n_processors, self.warp_size = _describe(device)
        self._last: torch.cuda.Event | None = None
        self._partials = [torch.zeros(1, dtype=torch.float64, device=device)]

    def current(self) -> AbstractContextManager[object]:
        """Make the device the current one: kernels are launched there."""
        return nullcontext() if self._guard is None else self._guard(self.device)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Enqueue what is in the block behind all earlier blocks, whichever streams they were on."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            yield
            return
        if self._last is None:
            self._last = torch.cuda.Event()
        else:
            torch.cuda.current_stream().wait_event(self._last)
        yield
        self._last.record()

    def partials(self, n_partials: int) -> Tensor:
        """Scratch memory for at least `n_partials` partial norms, float64."""
        if self._partials[-1].numel() < n_partials:
            # Smaller ones stay: a captured graph may write to them at its replays.
            self._partials.append(torch.zeros(n_partials, dtype=torch.float64, device=self.device))
        return self._partials[-1]


def _describe(device: torch.device) -> tuple[str, str, int, int]:
    """Name, architecture as triton names it, multiprocessors, and threads of a warp."""
    if device.type != "cuda":
        return device.type, device.type, 1, 32
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"{properties.major}{properties.minor}"
    return properties.name, arch, properties.multi_processor_count, properties.warp_size
