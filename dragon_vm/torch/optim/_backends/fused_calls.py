"""Which tensors of a flattened group share one of torch's fused CPU operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm, kinds
from dragon.vm.torch.optim._backends.pieces import Piece, Scratch
from dragon.vm.torch.optim._backends.selection import Picker, picker
from dragon.vm.torch.optim._gradients.scaling import Factors, clip_value
from dragon.vm.torch.optim._gradients.unscaling import unscale_all
from dragon.vm.torch.optim._groups.buffers import SMALL_NUMEL
from dragon.vm.torch.optim._groups.flattening import Entry, Signature
from dragon.vm.torch.optim._options import Group, by_value

# Hyperparameters, beside those of the algorithm and the learning rate, that tensors of one call must share.
_COMMON_NAMES = ("maximize", "clip_norm", "clip_value")


class FusedCall(NamedTuple):
    """One fused operation on tensors that have everything but their memory in common.

    Attributes:
        pick: selects the tensors among the group's.
        group_index: their parameter groups.
        group: hyperparameters of the tensors, the learning rate of each step among them.
        numbers: keywords of the operation, as they are at every step: all but the learning rate.
        factor: of the gradients, positive: the sign is `maximize`'s.
        bound: of the gradients' magnitudes; 0 for none.
        divisor: what the gradients are divided by after the operation; 1 to leave them as it does.
        needs_copies: whether the operation reads other gradients than the tensors' own.
        is_small: whether one thread is faster.
    """

    pick: Picker
    group_index: Sequence[int]
    group: Group
    numbers: dict[str, Any]
    factor: float
    bound: float
    divisor: float
    needs_copies: bool
    is_small: bool

    def has_one_rate(self, groups: Sequence[Group]) -> bool:
        """Whether its parameter groups still have one learning rate."""
        return len(self.group_index) == 1 or len({groups[index]["lr"] for index in self.group_index}) == 1

    def limited(self, grads: list[Tensor], copies: list[Tensor]) -> list[Tensor]:
        """Copies of gradients, which the operation may write to, clipped, and scaled if it does not scale them."""
        torch._foreach_copy_(copies, grads)
        is_scaled = self.numbers["grad_scale"] is not None
        if self.factor != 1 and not is_scaled:
            torch._foreach_mul_(copies, _number(self.factor, copies[0].dtype))
        if self.bound:
            bound = self.bound / self.factor if is_scaled else self.bound
            # What the dtype cannot hold only an infinity exceeds: it becomes the largest number then.
            bound = min(bound, torch.finfo(copies[0].dtype).max)
            torch._foreach_clamp_max_(copies, bound)
            torch._foreach_clamp_min_(copies, -bound)
        return copies


def divide(grads: list[Tensor], divisor: float) -> None:
    """Divide gradients that stay behind, which are laid out like their parameters."""
    number = _number(divisor, grads[0].dtype)
    if any(map(Tensor.is_inference, grads)):
        unscale_all(grads, number)
    else:
        # In a third of the time. No gradient here is conjugated, negated or expanded.
        torch._foreach_div_(grads, number)


def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number for an operation on a list. As a float it would be made a tensor for each element, in 1 us each."""
    return torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32), device="cpu")


class FusedPlanner:
    """Plans the fused calls of one flattened group, with flat buffers behind its entries.

    Attributes:
        group_index: for each of these, the index of its parameter group.
    """

    def __init__(self, signature: Signature, entries: Sequence[Entry], algorithm: Algorithm) -> None:
        self._algorithm, self._param_dtype = algorithm, signature.param_dtype
        self._reads_copies = signature.grad_dtype != signature.param_dtype
        self._positions = [entry.position for entry in entries]
        self._read_key = itemgetter(*algorithm.fused_names, *_COMMON_NAMES)
        self._keys: list[Any] = []
        params = [entry.param for entry in entries]
        are_small = [param.numel() < SMALL_NUMEL for param in params]
        self.group_index = [entry.group_index for entry in entries]
        self._classes = list(zip(self.group_index, are_small, strict=True))
        # Rows that take part, and these rows by parameter group and size class.
        self._parts: tuple[Sequence[int], dict[tuple[int, bool], list[int]]] = [], {}
        self._scratch = Scratch(params, are_small)

    def read(self, groups: Sequence[Group]) -> bool:
        """Take all hyperparameters but learning rates; return whether some call depends on the step count."""
        keys = list(map(self._read_key, groups))
        self._keys = keys if kinds(keys) <= {float, int, bool, tuple} else list(map(by_value, keys))
        return any(map(self._algorithm.depends_on_step, groups))

    def plan(
        self, groups: Sequence[Group], rows: Sequence[int], steps: list[float], factors: Factors
    ) -> list[FusedCall]:
        """Collect what may go into one call; parameter groups of equal hyperparameters share one.

        `rows` are the tensors that take part. `steps` are the counts of all tensors, one if they agree, or none if
        none are needed.
        """
        if rows != self._parts[0]:
            parts: dict[tuple[int, bool], list[int]] = {}
            for row in rows:
                parts.setdefault(self._classes[row], []).append(row)
            self._parts = rows, parts
        found: dict[tuple[Any, float, float, bool], list[int]] = {}
        for (index, is_small), members in self._parts[1].items():
            group = groups[index]
            key = float(group["lr"]), self._keys[index]
            counts = steps if self._algorithm.depends_on_step(group) else []
            if len(counts) <= 1 and not factors.each:
                found.setdefault((key, abs(factors.of(0, group)), 0.0, is_small), []).extend(members)
                continue
            for row in members:
                factor = abs(factors.of(self._positions[row], group))
                count = counts[row] if len(counts) > 1 else 0.0
                found.setdefault((key, factor, count, is_small), []).append(row)
        return [
            self._call(chosen, groups, factor, factors.kept_scale, is_small)
            for (_, factor, _, is_small), chosen in found.items()
        ]

    def pieces(self, call: FusedCall, columns: Sequence[list[Tensor]]) -> Iterable[Piece]:
        """What a call updates at a time: all, unless it reads copies of the gradients.

        The columns are parameters, gradients and others.
        """
        if not call.needs_copies:
            return [(slice(None), columns, [])]
        return self._scratch.of_small(call.pick, columns) if call.is_small else self._scratch.of_large(columns)

    def _call(
        self, rows: list[int], groups: Sequence[Group], factor: float, kept_scale: float | None, is_small: bool
    ) -> FusedCall:
        pick = picker(sorted(rows), len(self._positions))
        group_index = list(set(pick(self.group_index)))
        group = groups[group_index[0]]
        bound = clip_value(group)
        numbers: dict[str, Any] = {
            **self._algorithm.fused_numbers(group),
            "weight_decay": float(group["weight_decay"]),
            "maximize": bool(group["maximize"]),
            "found_inf": None,
            "grad_scale": None,
        }
        # The operation divides in fp32, where a gradient of half precision would underflow. It divides by an fp32
        # number: too coarse for fp64, infinite for tiny factors.
        is_wide = self._param_dtype in (torch.float64, torch.complex128)
        is_scaled = factor != 1 and not is_wide and 1e-38 < factor < math.inf
        if is_scaled:
            numbers["grad_scale"] = torch.tensor(1 / factor, dtype=torch.float32, device="cpu")
        # It writes back what it has scaled.
        leaves_own = is_scaled and not bound and not self._reads_copies
        is_right = kept_scale is None or (kept_scale != 0 and factor == 1 / kept_scale)
        divisor = 1.0 if kept_scale is None or (leaves_own and is_right) else kept_scale
        needs_copies = bool(bound) or (factor != 1 and not is_scaled) or (leaves_own and not is_right)
        return FusedCall(pick, group_index, group, numbers, factor, bound, divisor, needs_copies, is_small)
