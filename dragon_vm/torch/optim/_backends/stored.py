"""The update of tensors in any format: decode, update, encode. The specification of what kernels do with parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm, Maths
from dragon.vm.torch.optim._algorithms.average import average_update
from dragon.vm.torch.optim._backends.selection import Gathered
from dragon.vm.torch.optim._formats import Format, Rounding, random_words, square_root
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Factors, clip_value
from dragon.vm.torch.optim._gradients.unscaling import unscale_all
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._groups.storage import walker

Group = dict[str, Any]


class StoredUpdate:
    """Updates the tensors of one flattened group through their formats.

    Args:
        group: the tensors.
        algorithm: what is computed.
        seed: of random words.
        piece: elements that are decoded at a time, a multiple of 64; None for whole tensors.
    """

    def __init__(self, group: FlattenedGroup, algorithm: Algorithm, seed: int, piece: int | None = None) -> None:
        self._algorithm, self._signature = algorithm, group.signature
        self._seed, self._piece = seed, piece
        self._keys = group.signature.part_keys
        # Without the tensors: those of each step are gathered.
        self._members = [(e.position, e.group_index, e.stream, e.first) for e in group.entries]
        is_wide = group.signature.param_dtype in (torch.float64, torch.complex128)
        self._dtype = torch.float64 if is_wide else torch.float32
        is_exact = group.signature.is_narrowed and not is_wide
        self._maths = Maths(square_root if is_exact else torch.sqrt, group.signature.is_bounded)

    def update(
        self, tensors: Gathered, grads: Sequence[Tensor | None], groups: Sequence[Group], factors: Factors
    ) -> None:
        """Advance the counters and update the tensors.

        Args:
            tensors: all that the step gathered.
            grads: this group's gradients, in their parameters' layouts; None for a parameter that takes no part.
            groups: all parameter groups of the optimizer.
            factors: of the gradients.
        """
        for (position, index, stream, first), grad in zip(self._members, grads, strict=True):
            if grad is None:
                continue
            group = groups[index]
            state = {key: tensors.states[key][position] for key in self._signature.all_keys}
            counter = state.get("step")
            if counter is not None:
                counter += 1
            rounding = Rounding(self._seed, stream, 0 if counter is None else counter, first)
            param = tensors.params[position]
            self._update_one(param, grad, state, group, factors.of(position, group), rounding)
        if factors.kept_scale not in (None, 1.0):
            unscale_all([grad for grad in grads if grad is not None], factors.kept_scale)

    def _update_one(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Group,
        factor: float,
        rounding: Rounding,
    ) -> None:
        own, *states = self._keys
        walk = walker(param)
        parts = [[walk(as_real(param)), *(walk(state[key]) for key in own[1:])]]
        parts += [[walk(as_real(state[key])) for key in keys] for keys in states]
        averages = [walk(as_real(state["ema"]))] if "ema" in state else []
        gradient = walk(as_real(grad))
        step, numel = state.get("step"), gradient.numel()
        if self._piece is None or not is_dense(param):
            self._update_piece(parts, gradient, averages, step, group, factor, rounding)
            return
        for start in range(0, numel, self._piece):
            end = min(start + self._piece, numel)
            cut = [
                [part[start // per : -(-end // per)] for part, per in zip(tensors, _widths(form), strict=True)]
                for tensors, form in zip(parts, self._signature.formats, strict=True)
            ]
            here = rounding._replace(first=rounding.first + start)
            self._update_piece(
                cut, gradient[start:end], [a[start:end] for a in averages], step, group, factor, here
            )

    def _update_piece(
        self,
        parts: Sequence[Sequence[Tensor]],
        grad: Tensor,
        averages: Sequence[Tensor],
        step: Tensor | None,
        group: Group,
        factor: float,
        rounding: Rounding,
    ) -> None:
        """Update a piece of one tensor.

        Args:
            parts: of the parameter and of each state.
            grad: the gradient.
            averages: the average, if there is one.
            step: the count of this step.
            group: hyperparameters.
            factor: of the gradient.
            rounding: what decides the random words.
        """
        dtype, formats = self._dtype, self._signature.formats
        ready = grad.to(dtype)
        if factor != 1:
            ready = ready * factor
        if bound := clip_value(group):
            ready = ready.clamp(-bound, bound)
        param, *states = (form.decode(stored).to(dtype) for form, stored in zip(formats, parts, strict=True))
        param, states = self._algorithm.update(param, ready, states, step, group, self._maths)
        words: list[Tensor] = []
        if self._signature.is_stochastic:
            words = [word.view(grad.shape) for word in random_words(rounding, grad.numel(), grad.device)]
        for index, (form, value, stored) in enumerate(zip(formats, (param, *states), parts, strict=True)):
            form.encode(value, stored, words[min(index, 1)] if form.stochastic else None)
        for average in averages:
            stored_param = formats[0].decode(parts[0]).to(dtype)
            average.copy_(average_update(average.to(dtype), stored_param, group["ema_decay"]))


def _widths(form: Format) -> list[int]:
    return [part.elements for part in form.parts]
