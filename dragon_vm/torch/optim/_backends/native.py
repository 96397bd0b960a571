"""The native backend: torch's fused CPU operations, as few calls as hyperparameters allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm, FusedOptions
from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._backends.threads import on_one_thread
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Factors, clip_value
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.states import counter_buffer
from dragon.vm.torch.optim._options import by_value

# A fused operation forks its threads once a tensor. Below this many elements a tensor, one thread is faster:
# 1000 tensors of 1000 elements took 0.87 ms on one thread, 2.05 ms on two (torch 2.13, 2 cores).
SINGLE_THREAD_NUMEL = 8192

# Hyperparameters, beside those of the algorithm, that tensors of one call must share.
_COMMON_NAMES = ("maximize", "grad_scale", "clip_norm", "clip_value")

Group = dict[str, Any]


class _Call(NamedTuple):
    """One fused operation on tensors that have everything but their memory in common.

    Attributes:
        pick: selects the tensors among the group's.
        first: position of the first of them in the group.
        group: hyperparameters.
        factor: of the gradients, positive: the sign is `maximize`'s.
        bound: of the gradients' magnitudes; 0 for none.
        numbers: keywords of the operation, whatever the algorithm.
        is_small: whether one thread is faster.
    """

    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    first: int
    group: Group
    factor: float
    bound: float
    numbers: dict[str, Any]
    is_small: bool

    def limited(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients that the operation does not scale on its own, scaled, and all of them clipped."""
        if self.factor != 1 and self.numbers["grad_scale"] is None:
            grads = list(torch._foreach_mul(grads, self.factor))
        if self.bound:
            grads = list(torch._foreach_clamp_min(torch._foreach_clamp_max(grads, self.bound), -self.bound))
        return grads


class NativeGroup:
    """One flattened group on the CPU: parameters and states of one dtype, all in one layout.

    Args:
        group: the tensors.
        algorithm: what is computed.
        n_gathered: how many tensors a step gathers.
    """

    def __init__(self, group: FlattenedGroup, algorithm: Algorithm, n_gathered: int) -> None:
        self._algorithm, self._signature = algorithm, group.signature
        self.positions = [entry.position for entry in group.entries]
        self.pick = picker(self.positions, n_gathered)
        self._group_index = [entry.group_index for entry in group.entries]
        self._counters = _Counters(group) if group.signature.counts_steps else None
        self._read_key = itemgetter(*algorithm.fused_names, *_COMMON_NAMES)
        self._keys: list[Any] = []
        self._needs_steps = False
        self._calls: list[_Call] = []
        self._picks: dict[tuple[tuple[int, bool], ...], tuple[int, Any]] = {}
        # What the calls were planned for.
        self._version = -1
        self._planned_for: object = None
        # Positions in this group of the tensors of one parameter group and size class.
        self._parts: dict[tuple[int, bool], list[int]] = {}
        for position, entry in enumerate(group.entries):
            is_small = entry.param.numel() < SINGLE_THREAD_NUMEL
            self._parts.setdefault((entry.group_index, is_small), []).append(position)

    def update(
        self, tensors: Gathered, grads: Sequence[Tensor], groups: Sequence[Group], version: int, factors: Factors
    ) -> None:
        """Advance the counters and update the tensors.

        Args:
            tensors: all that the step gathered.
            grads: this group's gradients; those with a factor other than 1 may be left scaled.
            groups: all parameter groups of the optimizer.
            version: of their hyperparameters; a new one after each change.
            factors: of the gradients.
        """
        signature = self._signature
        if signature.grad_dtype != signature.param_dtype:
            grads = [grad.to(signature.param_dtype) for grad in grads]
        if version != self._version:
            self._keys = [by_value(self._read_key(group)) for group in groups]
            self._needs_steps = any(map(self._algorithm.depends_on_step, groups))
            self._planned_for, self._version = None, version
        params = self.pick(tensors.params)
        states = [self.pick(tensors.states[key]) for key in signature.state_keys]
        counters = self.pick(tensors.states["step"]) if self._counters else ()
        steps = self._counters.advance(counters, self._needs_steps) if self._counters else []
        # Counts advance together: their differences stay, and with them what may share a call.
        planned_for = ([step - steps[0] for step in steps], factors.common, factors.each)
        if planned_for != self._planned_for:
            self._calls = self._plan(groups, steps, factors)
            self._planned_for = planned_for
        small = [call for call in self._calls if call.is_small]
        if small:
            on_one_thread(lambda: self._run(small, params, grads, states, counters, steps))
        self._run([call for call in self._calls if not call.is_small], params, grads, states, counters, steps)
        if signature.ema_dtype is not None:
            emas = self.pick(tensors.states["ema"])
            for param, ema, index in zip(params, emas, self._group_index, strict=True):
                as_real(ema).lerp_(as_real(param), 1 - groups[index]["ema_decay"])

    def _plan(self, groups: Sequence[Group], steps: list[float], factors: Factors) -> list[_Call]:
        """Collect what may go into one call; parameter groups of equal hyperparameters share one."""
        parts: dict[tuple[Any, float, bool], list[tuple[int, bool]]] = {}
        single: dict[tuple[Any, float, float, bool], list[int]] = {}
        for part, positions in self._parts.items():
            group, key, is_small = groups[part[0]], self._keys[part[0]], part[1]
            counts = steps if self._algorithm.depends_on_step(group) else []
            if len(counts) <= 1 and not factors.each:
                parts.setdefault((key, abs(factors.of(0, group)), is_small), []).append(part)
                continue
            for position in positions:
                factor = abs(factors.of(self.positions[position], group))
                count = counts[position] if len(counts) > 1 else 0.0
                single.setdefault((key, factor, count, is_small), []).append(position)
        calls = []
        for (_, factor, is_small), members in parts.items():
            first, pick = self._pick_parts(tuple(members))
            calls.append(self._call(first, pick, groups[members[0][0]], factor, is_small))
        for (_, factor, _, is_small), positions in single.items():
            pick = picker(positions, len(self.positions))
            calls.append(self._call(positions[0], pick, groups[self._group_index[positions[0]]], factor, is_small))
        return calls

    def _pick_parts(self, parts: tuple[tuple[int, bool], ...]) -> tuple[int, Any]:
        """The first position of parts, and what selects their tensors in the order of the group."""
        if parts not in self._picks:
            # Parts that share a call change with the hyperparameters: what no plan asks for again must go.
            if len(self._picks) > 2 * len(self._parts):
                self._picks.clear()
            positions = sorted(position for part in parts for position in self._parts[part])
            self._picks[parts] = positions[0], picker(positions, len(self.positions))
        return self._picks[parts]

    def _call(self, first: int, pick: Any, group: Group, factor: float, is_small: bool) -> _Call:
        bound = clip_value(group)
        numbers: dict[str, Any] = {
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group["maximize"]),
            "found_inf": None,
            "grad_scale": None,
        }
        # The operation divides by an fp32 number: too coarse for fp64, too late for a clip, infinite for tiny
        # factors. Nor may it write a NaN into the gaps of a flat buffer.
        is_wide = self._signature.param_dtype in (torch.float64, torch.complex128)
        if factor != 1 and not bound and not is_wide and 1e-38 < abs(factor) < math.inf:
            numbers["grad_scale"] = torch.tensor(1 / factor, dtype=torch.float32, device="cpu")
        return _Call(pick, first, group, factor, bound, numbers, is_small)

    def _run(
        self,
        calls: Sequence[_Call],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        counters: Sequence[Tensor],
        steps: list[float],
    ) -> None:
        for call in calls:
            chosen = list(call.pick(params))
            chosen_grads = list(call.pick(grads))
            chosen_states = [list(call.pick(state)) for state in states]
            if chosen[0].is_complex():
                chosen, chosen_grads = list(map(as_real, chosen)), list(map(as_real, chosen_grads))
                chosen_states = [list(map(as_real, state)) for state in chosen_states]
            if call.factor != 1 or call.bound:
                chosen_grads = call.limited(chosen_grads)
            step = steps[call.first] if len(steps) > 1 else next(iter(steps), 0.0)
            self._algorithm.fused(
                chosen,
                chosen_grads,
                chosen_states,
                list(call.pick(counters)) if counters else [],
                FusedOptions(call.numbers, call.group),
                step,
            )


class _Counters:
    """Counts the steps of a flattened group, by one operation where the counters lie side by side."""

    def __init__(self, group: FlattenedGroup) -> None:
        steps = [entry.state["step"] for entry in group.entries]
        first, itemsize = steps[0].data_ptr(), steps[0].element_size()
        are_adjacent = [step.data_ptr() for step in steps] == [first + i * itemsize for i in range(len(steps))]
        # Our own memory, of which the user's counters are pieces.
        self._buffer = counter_buffer(steps) if are_adjacent else None

    def advance(self, counters: Sequence[Tensor], are_needed: bool) -> list[float]:
        """Count the step; return the counts if they are needed: one if all agree, or none."""
        buffer = self._buffer
        if buffer is None:
            _count(counters)
        else:
            buffer += 1
        if not are_needed:
            return []
        counts = list(map(float, counters)) if buffer is None else buffer.tolist()
        return counts[:1] if counts.count(counts[0]) == len(counts) else counts


def _count(counters: Sequence[Tensor]) -> None:
    # Joined parameters share a counter; a number would be wrapped once for each tensor.
    torch._foreach_add_(
        list({id(counter): counter for counter in counters}.values()), torch.ones((), device="cpu")
    )
