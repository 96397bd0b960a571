"""The prepared steps of one optimizer: the latest few, and those that graphs took over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._capture import check_live, is_capturing
from dragon.vm.torch.optim._checks import restored_on_error
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._live import make_live
from dragon.vm.torch.optim._owner import Owner
from dragon.vm.torch.optim._step import PreparedStep

# Sets of parameters with a gradient whose steps are kept.
_N_LATEST = 8


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Let tables and states be tensors that later steps may write to, whatever mode those are in."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class PreparedSteps:
    """Prepared steps by what they were asked to do, and with which of the parameters."""

    def __init__(self) -> None:
        self._latest: dict[bytes, PreparedStep] = {}
        # By identity, each with its twins, whose tables graphs read: all stay, whatever becomes of the plans.
        self._captured: dict[int, tuple[PreparedStep, list[PreparedStep]]] = {}

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
        grads: Gradients,
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
        grads: Gradients,
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
            make_live(optimizer)
            with restored_on_error(optimizer.state), _outside_inference_mode():
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
        """A prepared step for the graph that is being captured.

        Raises:
            RuntimeError: as `PreparedStep.captured`.
        """
        make_live(optimizer)
        twin = prepared.captured(optimizer)
        self._captured.setdefault(id(prepared), (prepared, []))[1].append(twin)
        return twin

    def publish(self, optimizer: Owner, group: dict[str, Any]) -> None:
        """Upload a group's hyperparameters to wherever kernels read them, in stream order.

        Raises:
            RuntimeError: within a capture, for a graph would repeat the upload; once there are graphs, for a
                tensor that they would not see change.
        """
        graphs = {key: prepared for key, (prepared, _) in self._captured.items()}
        steps = {**{id(step): step for step in self._latest.values()}, **graphs}
        if steps and is_capturing():
            raise RuntimeError(
                "a hyperparameter cannot change within a capture: set it before, or between replays"
            )
        if graphs:
            check_live(group)
        for step in steps.values():
            step.publish(group)
