"""The native backend: torch's fused CPU operations, as few calls as hyperparameters allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._backends.flats import Flats, with_flats
from dragon.vm.torch.optim._backends.fused_calls import FusedCall, FusedPlanner, divide
from dragon.vm.torch.optim._backends.selection import Gathered, picked, picker
from dragon.vm.torch.optim._backends.threads import on_one_thread
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Factors
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.states import counter_buffer
from dragon.vm.torch.optim._options import Group, Version

Tensors = Sequence[Tensor]
# Those that are faster on one thread, and the others.
Calls = tuple[list[FusedCall], list[FusedCall]]


class NativeGroup:
    """One flattened group on the CPU: parameters and states of one dtype, all in one layout."""

    def __init__(self, group: FlattenedGroup, algorithm: Algorithm, n_gathered: int) -> None:
        self._algorithm, self._signature = algorithm, group.signature
        self._pick = picker([entry.position for entry in group.entries], n_gathered)
        self._flats, entries = Flats(group), with_flats(group)
        self._counters = _Counters(group) if group.signature.counts_steps else None
        self._planner = FusedPlanner(group.signature, entries, algorithm)
        self._needs_steps = False
        # What calls were planned for, and these. One assignment writes both: whatever interrupts a step, no calls
        # pass for those of another one.
        self._planned: tuple[object, Calls] = None, ([], [])
        self._version: Version | None = None

    def update(self, tensors: Gathered, groups: Sequence[Group], version: Version, factors: Factors) -> None:
        """Advance the counters and update the tensors that have a gradient."""
        signature, flats = self._signature, self._flats
        grads = own_grads = self._pick(tensors.grads)
        if signature.grad_dtype != signature.param_dtype:
            grads = [None if grad is None else grad.to(signature.param_dtype) for grad in grads]
        if version != self._version:
            self._read(groups, version)
        keys = (*signature.state_keys, "step") if self._counters else signature.state_keys
        params, *states = picked(self._pick, [tensors.shards, *[tensors.states[key] for key in keys]])
        counters = states.pop() if self._counters else ()
        columns = [params, grads, own_grads, *states]
        rows: Sequence[int] = range(len(params))
        if not tensors.are_all:
            rows = [row for row, grad in enumerate(grads) if grad is not None]
            if not rows:
                return
        emas = self._pick(tensors.states["ema"]) if signature.ema_dtype is not None else ()
        # A buffer is updated at once only where its parameters have one count.
        needs_steps = self._needs_steps or bool(flats)
        steps = self._counters.advance(counters, rows, needs_steps) if self._counters else []
        chosen = flats.chosen(rows, steps) if flats else []
        if flats:
            flats.copy_grads(grads, chosen)
            names = ("param", "grad", "grad", *signature.state_keys)
            columns = [flats.behind(column, name) for column, name in zip(columns, names, strict=True)]
            counters, steps = flats.with_counts(counters), flats.with_counts(steps)
            emas, rows = flats.behind(emas, "ema"), flats.in_place_of(rows, chosen)
        small, large = self._plan(rows, steps, groups, factors)
        if small:
            on_one_thread(lambda: self._run(small, columns, counters, steps))
        self._run(large, columns, counters, steps)
        for row in rows if emas else ():
            param, ema, index = columns[0][row], emas[row], self._planner.group_index[row]
            as_real(ema).lerp_(as_real(param), 1 - float(groups[index]["ema_decay"]))
        if chosen and factors.kept_scale not in (None, 1.0):
            # Copies were divided so far.
            divide(list(map(as_real, flats.picked(own_grads, chosen))), factors.kept_scale)

    def _plan(self, rows: Sequence[int], steps: list[float], groups: Sequence[Group], factors: Factors) -> Calls:
        """Plan the calls for some rows, with flat buffers behind those of the entries, unless they are planned."""
        # Counts advance together: their differences stay, and with them what may share a call.
        differences = [step - steps[0] for step in steps]
        planned_for = (differences, factors.common, factors.each, factors.kept_scale, rows)
        if planned_for != self._planned[0]:
            calls = self._planner.plan(groups, rows, steps, factors)
            small = [call for call in calls if call.is_small]
            self._planned = planned_for, (small, [call for call in calls if not call.is_small])
        return self._planned[1]

    def _read(self, groups: Sequence[Group], version: Version) -> None:
        """Take changed hyperparameters. Calls read learning rates where they are, and stay as long as they fit."""
        if self._version is None or version[0] != self._version[0]:
            self._needs_steps = self._planner.read(groups)
            self._planned = None, ([], [])
        # A list: an interrupt is lost in a generator that ends early.
        elif [call for call in chain(*self._planned[1]) if not call.has_one_rate(groups)]:
            self._planned = None, ([], [])
        self._version = version

    def _run(self, calls: list[FusedCall], columns: list[Tensors], counters: Tensors, steps: list[float]) -> None:
        """Update by fused operations; `columns` are parameters, gradients, those that stay behind, and states."""
        is_complex, common_step = self._signature.param_dtype.is_complex, next(iter(steps), 0.0)
        for call in calls:
            chosen = list(map(list, picked(call.pick, columns)))
            if is_complex:
                chosen = [list(map(as_real, column)) for column in chosen]
            step = call.pick(steps)[0] if len(steps) > 1 else common_step
            chosen_counters = list(call.pick(counters)) if counters else []
            if not call.needs_copies and call.divisor == 1:
                params, grads, _, *states = chosen
                self._algorithm.fused(params, grads, states, chosen_counters, call.group, call.numbers, step)
                continue
            for rows, (params, grads, own_grads, *states), copies in self._planner.pieces(call, chosen):
                limited = call.limited(grads, copies) if copies else grads
                self._algorithm.fused(
                    params, limited, states, chosen_counters[rows], call.group, call.numbers, step
                )
                if call.divisor != 1:
                    # In the layout of a parameter nothing is expanded.
                    divide(own_grads, call.divisor)


class _Counters:
    """Counts the steps of a flattened group, by one operation where the counters lie side by side."""

    def __init__(self, group: FlattenedGroup) -> None:
        steps = [entry.state["step"] for entry in group.entries]
        first, itemsize = steps[0].data_ptr(), steps[0].element_size()
        are_adjacent = [step.data_ptr() for step in steps] == [first + i * itemsize for i in range(len(steps))]
        # Our own memory, of which the user's counters are pieces.
        self._buffer = counter_buffer(steps) if are_adjacent else None
        # A number would be made a tensor at each step, in as much time as the addition takes.
        self._one = torch.ones((), device="cpu")

    def advance(self, counters: Sequence[Tensor], rows: Sequence[int], are_needed: bool) -> list[float]:
        """Count the step of some rows; return all counts if they are needed: one if all agree, or none."""
        buffer = self._buffer
        if buffer is None:
            torch._foreach_add_(list(map(counters.__getitem__, rows)), self._one)
        elif len(rows) == len(counters):
            buffer.add_(self._one)
        else:
            flags = bytearray(len(counters))
            for row in rows:
                flags[row] = 1
            buffer += torch.frombuffer(flags, dtype=torch.uint8)
        if not are_needed:
            return []
        if buffer is not None:
            counts = buffer.tolist()
        else:
            # What belongs to others may be no counter any more.
            own = {row: float(counters[row]) for row in rows}
            counts = [own.get(row, own[rows[0]]) for row in range(len(counters))]
        return counts[:1] if counts.count(counts[0]) == len(counts) else counts
