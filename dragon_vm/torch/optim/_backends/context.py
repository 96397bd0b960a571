"""What the triton backend knows and keeps of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from dragon.kernels import table
from dragon.kernels.archs import arch_name


class Hardware(NamedTuple):
    """What launches are for: name, architecture as in "sm_90", multiprocessors, threads of a warp."""

    name: str
    arch: str
    n_processors: int
    warp_size: int


class DeviceContext:
    """What all plans of one optimizer on one device share.

    Attributes:
        status: float64 [STATUS_COLUMNS], written by the kernels and read only on request.
        hardware: what is launched for.
        one, zero: fp32 [1], the grad_scale and found_inf of a step without a scaler.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.status = torch.zeros(int(table.STATUS_COLUMNS), dtype=torch.float64, device=device)
        self.spare_status = torch.zeros_like(self.status)
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        self.hardware = describe(device)
        self._module: Any = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
        self._last: torch.Event | None = None
        self._stream = self.stream()
        # Each with the stream on which it was allocated.
        self._partials = [(torch.zeros(1, dtype=torch.float64, device=device), self._stream)]

    def launch(self, run: Callable[[], None], *, in_order: bool) -> None:
        """Call `run`, which launches, with this device as the current one.

        With `in_order` it enqueues behind all earlier launches of this kind, whichever streams those were on.
        """
        current = None if self._module is None else self._module.current_device()
        if current is None or current == self.device.index:
            self._run(run, in_order)
            return
        try:
            # Unlike `set_device`, on the way out it makes no context on a current device that nobody has used.
            with self._module.device(self.device):
                self._run(run, in_order)
        finally:
            # An interrupt may have hit the way out.
            if self._module.current_device() != current:
                self._module.set_device(current)

    def _run(self, run: Callable[[], None], in_order: bool) -> None:
        if not in_order or self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            run()
            return
        if self._last is None:
            self._last = torch.Event(self.device)
        else:
            self._last.wait()
        run()
        self._last.record()

    def stream(self) -> int | None:
        """The stream on which memory is allocated and work enqueued now; None on a device without streams."""
        return None if self.device.type != "cuda" else driver.active.get_current_stream(self.device.index)

    def record(self, allocated_on: int | None, tensors: Sequence[Tensor]) -> None:
        """Tell the allocator that tensors of another stream, and what this object keeps, are used on this one."""
        stream = self.stream()
        if stream != allocated_on:
            self._record(tensors)
        if stream != self._stream:
            self._record((self.status, self.spare_status, self.one, self.zero))

    def _record(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))

    def here(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor on this device."""
        return None if tensor is None else tensor.to(self.device, non_blocking=True)

    def partials(self, n_partials: int) -> Tensor:
        """Scratch memory for at least `n_partials` partial norms, float64."""
        stream = self.stream()
        if self._partials[-1][0].numel() < n_partials:
            # Smaller ones stay: a captured graph may write to them at its replays.
            self._partials.append((torch.zeros(n_partials, dtype=torch.float64, device=self.device), stream))
        partials, allocated_on = self._partials[-1]
        if stream != allocated_on:
            self._record([partials])
        return partials


def describe(device: torch.device) -> Hardware:
    """What launches on a device are for."""
    if device.type != "cuda":
        return Hardware(device.type, device.type, 1, 32)
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"{properties.major}{properties.minor}"
    return Hardware(properties.name, arch_name(arch), properties.multi_processor_count, properties.warp_size)
