"""The native backend: torch's fused CPU operations, as few calls as hyperparameters allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._chain import Factors
from dragon.vm.torch.optim._flatten import FlattenedGroup, follow_leaders
from dragon.vm.torch.optim._fused import KEYS, FusedCall, plan_call
from dragon.vm.torch.optim._layout import as_real
from dragon.vm.torch.optim._numbers import by_value
from dragon.vm.torch.optim._state import common_base

# A fused operation forks its threads once a tensor. Below this many elements a tensor, one thread is faster:
# 1000 tensors of 1000 elements took 0.87 ms on one thread, 2.05 ms on two (torch 2.13, 2 cores).
# Two Python threads with half of the tensors each are no faster: 1.62 instead of 1.29 ms a step for 1000 tensors
# of 1 element, the same for 1000 of 1000. The interpreter's lock and the wake-up cost what they gain.
SINGLE_THREAD_NUMEL = 8192

Numbers = tuple[Any, ...]


@contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class NativeGroup:
    """One flattened group on the CPU: parameter and states of one dtype, all in one layout.

    Args:
        group: the tensors.
        algorithm: "adam" or "sgd".
    """

    def __init__(self, group: FlattenedGroup, algorithm: str) -> None:
        self.group, self._algorithm = group, algorithm
        self._read_key = itemgetter(*KEYS[algorithm])
        self._numbers: list[Numbers] = []
        self._keys: list[Numbers] = []
        self._needs_steps = False
        self._states = [[state[key] for state in group.states] for key in group.signature.state_keys]
        self._steps: list[Tensor] = [state["step"] for state in group.states] if self._states else []
        self._step_base = common_base(self._steps) if self._steps else None
        # Calls with the positions that each takes, small tensors first; and what they were planned for.
        self._small: list[tuple[list[int], FusedCall]] = []
        self._large: list[tuple[list[int], FusedCall]] = []
        self._planned_for: object = None
        self._taken: dict[tuple[int, ...], tuple[list[Tensor], list[list[Tensor]], list[Tensor]]] = {}
        # Positions of the tensors of one parameter group and size class.
        self._parts: dict[tuple[int, bool], list[int]] = {}
        for index, (row, param) in enumerate(zip(group.rows, group.params, strict=True)):
            self._parts.setdefault((row, param.numel() >= SINGLE_THREAD_NUMEL), []).append(index)

    def update(
        self,
        grads: list[Tensor],
        groups: Sequence[dict[str, Any]],
        numbers: list[Numbers],
        factors: Factors,
    ) -> None:
        """Advance the counters and update the tensors.

        Args:
            grads: gradients, in the parameters' layouts; those with a factor other than 1 may be left scaled.
            groups: all parameter groups of the optimizer.
            numbers: their hyperparameters, comparable.
            factors: of the gradients.
        """
        signature = self.group.signature
        if signature.grad_dtype != signature.param_dtype:
            grads = [grad.to(signature.param_dtype) for grad in grads]
        if numbers != self._numbers:
            self._numbers = numbers
            self._keys = [by_value(self._read_key(group)) for group in groups]
            self._needs_steps = any(map(_depends_on_step, self._keys))
            self._planned_for = None
        steps = self._advance()
        # Counts advance together: what they differ by stays, and with it what may share a call.
        planned_for = ([step - steps[0] for step in steps], factors.common, factors.each)
        if planned_for != self._planned_for:
            self._plan(groups, self._keys, steps, factors)
            self._planned_for = planned_for
        with _one_thread() if self._small else nullcontext():
            _run(self._small, grads, steps)
        _run(self._large, grads, steps)
        if signature.average:
            for param, state, row in zip(self.group.params, self.group.states, self.group.rows, strict=True):
                as_real(state["ema"]).lerp_(as_real(param), 1 - groups[row]["ema_decay"])
        if self.group.joined_grads is not None:
            follow_leaders(self.group.states)

    def _advance(self) -> list[float]:
        """Count the step; return the counts if a call depends on them: one if all agree, or none."""
        if not self._steps:
            return []
        if self._step_base is not None:
            self._step_base += 1
        else:
            torch._foreach_add_(self._steps, 1)
        if not self._needs_steps:
            return []
        base = self._step_base
        if base is not None:
            first = base[0]
            return [float(first)] if torch.equal(base, first.expand_as(base)) else list(base.tolist())
        steps = [float(step) for step in self._steps]
        return steps[:1] if len(set(steps)) == 1 else steps

    def _plan(
        self, groups: Sequence[dict[str, Any]], keys: list[Numbers], steps: list[float], factors: Factors
    ) -> None:
        """Collect what may go into one call; parameter groups of equal hyperparameters share one."""
        members: dict[tuple[Numbers, float, float, bool], list[int]] = {}
        for (row, large), indices in self._parts.items():
            counts = steps if _depends_on_step(keys[row]) else [0.0]
            if len(counts) == 1 and not factors.each:
                factor = abs(factors.of(0, groups[row]))
                members.setdefault((keys[row], factor, counts[0], large), []).extend(indices)
                continue
            for index in indices:
                factor = abs(factors.of(self.group.indices[index], groups[row]))
                count = counts[index] if len(counts) > 1 else counts[0]
                members.setdefault((keys[row], factor, count, large), []).append(index)
        self._small, self._large = [], []
        for (_, factor, _, large), indices in members.items():
            # In their own order, so that a call for all takes the gradients as they come.
            indices.sort()
            tensors = self._take(tuple(indices))
            call = plan_call(self._algorithm, *tensors, groups[self.group.rows[indices[0]]], factor)
            (self._large if large else self._small).append((indices, call))

    def _take(self, indices: tuple[int, ...]) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        """Parameters, states and counters at these positions; the same lists as the last time."""
        taken = self._taken.get(indices)
        if taken is None:
            # Positions that share a call change with the hyperparameters: what no plan asks for again must go.
            if len(self._taken) > 2 * len(self.group.params):
                self._taken.clear()
            taken = self._taken[indices] = (
                [self.group.params[i] for i in indices],
                [[tensors[i] for i in indices] for tensors in self._states],
                [self._steps[i] for i in indices] if self._steps else [],
            )
        return taken


def _run(calls: Sequence[tuple[list[int], FusedCall]], grads: list[Tensor], steps: list[float]) -> None:
    for indices, call in calls:
        step = steps[indices[0]] if len(steps) > 1 else next(iter(steps), 0.0)
        call.run([grads[i] for i in indices] if len(indices) < len(grads) else grads, step)


def _depends_on_step(key: Numbers) -> bool:
    return bool(key[0] and key[1])
