"""Adding gradients to their sums by a kernel."""

from __future__ import annotations

from torch import Tensor

from dragon.vm.torch.optim._backends.context import DeviceContext
from dragon.vm.torch.optim._backends.triton import TritonDevice
from dragon.vm.torch.optim._groups.flattening import Entry, FlattenedGroup, Signature


class SumLaunch:
    """One launch that adds gradients to sums of one signature."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._numels: list[int] = []
        self._device: TritonDevice | None = None

    def add(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        """Add each gradient to its sum, which stands in the table as the parameter."""
        group = FlattenedGroup(self._signature, [Entry(total, {}, 0, i) for i, total in enumerate(totals)])
        numels = [total.numel() for total in totals]
        device = self._device
        if device is None or numels != self._numels:
            context = DeviceContext(self._signature.device)
            device = TritonDevice(
                [group], "accumulate", context, 1, len(totals), False, lambda group: {}, counts=False
            )
        # Whatever interrupts a first launch, its scalars do not pass for written.
        self._device = None
        device.accumulate(group, [grad.data_ptr() for grad in grads])
        self._device, self._numels = device, numels
