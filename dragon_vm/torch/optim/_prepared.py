"""The prepared steps of one optimizer: the latest few, and those that graphs took over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._capture import is_capturing
from dragon.vm.torch.optim._checks import restored_on_error
from dragon.vm.torch.optim._owner import Owner
from dragon.vm.torch.optim._step import PreparedStep

# Sets of parameters with a gradient whose steps are kept.
_N_LATEST = 8


class PreparedSteps:
    """Prepared steps by what they were asked to do, and with which of the parameters."""

    def __init__(self) -> None:
        self._latest: dict[bytes, PreparedStep] = {}
        # Each with its twin, whose tables the graph reads: both stay, whatever becomes of the plans.
        self._captured: list[tuple[PreparedStep, PreparedStep]] = []

    def __len__(self) -> int:
        return len(self._latest)

    def latest(self) -> list[PreparedStep]:
        """The kept steps, the last one used at the end."""
        return list(self._latest.values())

    def forget(self) -> None:
        """Prepare every step anew from here on."""
        self._latest.clear()

    def current(
        self,
        key: bytes,
        optimizer: Owner,
        params: list[Tensor],
        grads: list[Tensor],
        numbers: list[tuple[Any, ...]],
    ) -> PreparedStep | None:
        """The step of this key if everything is still as it was; None among the gradients is a difference."""
        prepared = self._latest.get(key)
        if prepared is None or not prepared.is_current(optimizer, params, grads, numbers):
            return None
        return prepared

    def prepare(
        self,
        key: bytes,
        optimizer: Owner,
        params: list[Tensor],
        grads: list[Tensor],
        numbers: list[tuple[Any, ...]],
    ) -> PreparedStep:
        """The step of this key, prepared if need be; its first byte says whether it zeroes the gradients.

        Raises:
            RuntimeError: if it would have to be prepared within a capture, and as `PreparedStep`.
            ValueError: as `PreparedStep`.
        """
        prepared = self.current(key, optimizer, params, grads, numbers)
        if prepared is None:
            if is_capturing():
                raise RuntimeError(
                    "a first step with these parameters, gradients, states and arguments cannot be captured: "
                    "take one before the capture, as PyTorch's notes on CUDA graphs do"
                )
            with restored_on_error(optimizer.state):
                prepared = PreparedStep(optimizer, params, grads, bool(key[0]))
        if optimizer._settings.flatten:
            # Joined parameters count as one: a step of some of them ends that.
            self._latest.clear()
        self._latest.pop(key, None)
        self._latest[key] = prepared
        while len(self._latest) > _N_LATEST:
            self._latest.pop(next(iter(self._latest)))
        return prepared

    def capture(self, prepared: PreparedStep, optimizer: Owner) -> PreparedStep:
        """A prepared step for the graph that is being captured."""
        twin = prepared.captured(optimizer)
        self._captured.append((prepared, twin))
        return twin

    def publish(self, optimizer: Owner, group: dict[str, Any]) -> None:
        """Upload a group's hyperparameters to wherever kernels read them, in stream order.

        Raises:
            RuntimeError: within a capture, for a graph would repeat the upload.
        """
        steps = [*self._latest.values(), *(prepared for prepared, _ in self._captured)]
        if steps and is_capturing():
            raise RuntimeError(
                "a hyperparameter cannot change within a capture: set it before, or between replays"
            )
        for step in steps:
            step.publish(optimizer, group)
