"""The updates in plain torch operations, a tensor or a piece of one at a time: the readable specification.

It runs on any device, takes any layout, format and complex tensors, and autograd sees through it if asked to. It
computes in fp32 for narrower tensors and reads counters, so on an accelerator it synchronises. The native backend
takes it, in pieces, for tensors that torch's fused operations round otherwise than the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm, Maths
from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._formats.philox import Rounding, random_words
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Factors, clip_value
from dragon.vm.torch.optim._gradients.unscaling import unscale_all
from dragon.vm.torch.optim._groups.entries import flat
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._options import Version

Group = dict[str, Any]

# Elements of a piece, of which four threads take a part in each operation: PyTorch gives a thread 32,768 or more.
# Half as many leave the caches to fewer bytes, and still cost a tenth more: an operation takes 1 us to start.
PIECE = 2**17


class HostGroup:
    """One flattened group, updated through its formats: decode, update, encode.

    `in_pieces` decodes `PIECE` elements at a time, a multiple of 64, and not whole tensors.
    """

    def __init__(
        self, group: FlattenedGroup, algorithm: Algorithm, n_gathered: int, seed: int, in_pieces: bool
    ) -> None:
        signature = group.signature
        self._algorithm, self._piece = algorithm, PIECE if in_pieces else None
        # Without the tensors: those of each step are gathered.
        self._members = [(e.position, e.group_index, Rounding(seed, e.stream, 0, e.first)) for e in group.entries]
        self.pick = picker([entry.position for entry in group.entries], n_gathered)
        is_wide = signature.param_dtype in (torch.float64, torch.complex128)
        self._dtype = torch.float64 if is_wide else torch.float32
        is_exact = signature.is_narrowed and not is_wide
        self._maths = Maths(square_root if is_exact else torch.sqrt, signature.is_bounded)
        self._is_flat = in_pieces or signature.is_narrowed
        # Names of the parts of the parameter, of each state and of the average; of all entries of a state.
        self._part_keys = *signature.part_keys, ("ema",) * (signature.ema_dtype is not None)
        self._all_keys, self._formats = signature.all_keys, signature.formats

    def update(
        self,
        tensors: Gathered,
        grads: Sequence[Tensor | None],
        groups: Sequence[Group],
        version: Version,
        factors: Factors,
    ) -> None:
        """Advance the counters and update the tensors; `grads` are this group's, None where one takes no part."""
        for (position, index, rounding), grad in zip(self._members, grads, strict=True):
            if grad is None:
                continue
            state = {key: tensors.states[key][position] for key in self._all_keys}
            step = state.get("step")
            if step is not None:
                step += 1
            factor = factors.of(position, groups[index])
            self._update_one(tensors.shards[position], grad, state, groups[index], factor, rounding)
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
        """Cut a tensor into pieces, in the order in which its memory is walked."""
        is_flat = self._is_flat and is_dense(param)
        entries = {"param": param, **state}
        parts = [
            [flat(as_real(entries[key])) if is_flat else as_real(entries[key]) for key in keys]
            for keys in self._part_keys
        ]
        gradient = flat(as_real(grad)) if is_flat else as_real(grad)
        if self._piece is None or not is_flat:
            self._update_piece(parts, gradient, state.get("step"), group, factor, rounding)
            return
        widths = [[part.elements for part in form.parts] for form in self._formats] + [[1]]
        for start in range(0, gradient.numel(), self._piece):
            end = min(start + self._piece, gradient.numel())
            cut = [
                [part[start // per : -(-end // per)] for part, per in zip(tensors, pers, strict=False)]
                for tensors, pers in zip(parts, widths, strict=True)
            ]
            here = rounding._replace(first=rounding.first + start)
            self._update_piece(cut, gradient[start:end], state.get("step"), group, factor, here)

    def _update_piece(
        self,
        parts: Sequence[Sequence[Tensor]],
        grad: Tensor,
        step: Tensor | None,
        group: Group,
        factor: float,
        rounding: Rounding,
    ) -> None:
        """Update a piece of one tensor; `parts` are those of the parameter, of each state and of the average."""
        formats, (*stored, averages) = self._formats, parts
        ready = self._wide(grad)
        if factor != 1:
            ready = ready * factor
        if bound := clip_value(group):
            # What the dtype cannot hold only an infinity exceeds.
            bound = min(bound, torch.finfo(ready.dtype).max)
            ready = ready.clamp(-bound, bound)
        param, *states = (self._wide(form.decode(each)) for form, each in zip(formats, stored, strict=True))
        param, states = self._algorithm.update(param, ready, states, step, group, self._maths)
        words: list[Tensor] = []
        if any(form.stochastic for form in formats):
            rounding = rounding if step is None else rounding._replace(step=step)
            words = [word.view(grad.shape) for word in random_words(rounding, grad.numel(), grad.device)]
        for index, (form, value, each) in enumerate(zip(formats, (param, *states), stored, strict=True)):
            form.encode(value, each, words[min(index, 1)] if form.stochastic else None)
        for average in averages:
            # Of the parameter as it is stored.
            value, ema = self._wide(formats[0].decode(stored[0])), self._wide(average)
            average.copy_(ema + (1 - float(group["ema_decay"])) * (value - ema))

    def _wide(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the maths; a copy if autograd may keep it."""
        if tensor.dtype != self._dtype:
            return tensor.to(self._dtype)
        return tensor.clone() if torch.is_grad_enabled() else tensor
