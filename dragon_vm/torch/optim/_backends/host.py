"""The updates in plain torch operations, a tensor at a time: the readable specification.

It runs on any device, takes any layout, format and complex tensors, and autograd sees through it if asked to. It
computes in fp32 for narrower tensors and reads counters, so on an accelerator it synchronises. The native backend
takes it for tensors that torch's fused operations round otherwise than the kernels do, in pieces: parts of a large
tensor, or small tensors one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm, Maths
from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._formats.philox import Rounding, Span, random_words
from dragon.vm.torch.optim._gradients.norms import as_real
from dragon.vm.torch.optim._gradients.scaling import Factors, clip_value
from dragon.vm.torch.optim._gradients.unscaling import unscale_all
from dragon.vm.torch.optim._groups.entries import flat
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._groups.layout import is_dense
from dragon.vm.torch.optim._modes import uncast
from dragon.vm.torch.optim._options import Group, Version

# Elements of a piece, of which four threads take a part in each operation: PyTorch gives a thread 32,768 or more.
# Half as many leave the caches to fewer bytes, and still cost a tenth more: an operation takes 1 us to start.
PIECE = 2**17


class Piece(NamedTuple):
    """What is decoded, updated and encoded at a time.

    Attributes:
        parts: the tensors of the parameter, of each state, and of the average.
        grad: the gradient.
        counter: of steps, counted when the piece is written; None where nothing counts.
        spans: of the tensors that stand one after the other.
        is_flat: whether it may be cut or joined: all tensors are of one dimension, in walking order.
        numbers: group index, factor of the gradient, and count: what updates them.
    """

    parts: list[list[Tensor]]
    grad: Tensor
    counter: Tensor | None
    spans: list[Span]
    is_flat: bool
    numbers: tuple[int, float, float]


class HostGroup:
    """One flattened group, updated through its formats: decode, update, encode.

    `in_pieces` decodes up to `PIECE` elements at a time, a multiple of 64, and not whole tensors.
    """

    def __init__(
        self, group: FlattenedGroup, algorithm: Algorithm, n_gathered: int, seed: int, in_pieces: bool
    ) -> None:
        signature = group.signature
        self._algorithm, self._piece = algorithm, PIECE if in_pieces else 0
        # Without the tensors: those of each step are gathered.
        self._members = [(e.position, e.group_index, Rounding(seed, e.stream, 0, e.first)) for e in group.entries]
        self._pick = picker([entry.position for entry in group.entries], n_gathered)
        is_wide = signature.param_dtype in (torch.float64, torch.complex128)
        self._dtype = torch.float64 if is_wide else torch.float32
        is_exact = signature.is_narrowed and not is_wide
        self._maths = Maths(square_root if is_exact else torch.sqrt, signature.is_bounded)
        self._is_flat = in_pieces or signature.is_narrowed
        # Names of the parts of the parameter, of each state and of the average; of all entries of a state.
        self._part_keys = *signature.part_keys, ("ema",) * (signature.ema_dtype is not None)
        self._all_keys, self._formats = signature.all_keys, signature.formats

    def update(self, tensors: Gathered, groups: Sequence[Group], version: Version, factors: Factors) -> None:
        """Advance the counters and update the tensors that have a gradient."""
        batch: list[Piece] = []
        room, grads = 0, self._pick(tensors.grads)
        for (position, index, rounding), grad in zip(self._members, grads, strict=True):
            if grad is None:
                continue
            state = {key: tensors.states[key][position] for key in self._all_keys}
            factor = factors.of(position, groups[index])
            piece = self._whole(tensors.shards[position], grad, state, rounding, index, factor)
            numel = piece.grad.numel()
            if batch and (numel > room or not piece.is_flat or piece.numbers != batch[0].numbers):
                self._update_all(batch, groups)
                batch = []
            if not batch:
                room = self._piece
            batch.append(piece)
            room -= numel
        if batch:
            self._update_all(batch, groups)
        if factors.kept_scale not in (None, 1.0):
            unscale_all([grad for grad in grads if grad is not None], factors.kept_scale)

    def _whole(
        self, param: Tensor, grad: Tensor, state: dict[str, Tensor], rounding: Rounding, index: int, factor: float
    ) -> Piece:
        """One tensor, in the order in which its memory is walked if that is asked for."""
        is_flat = self._is_flat and is_dense(param)
        entries = {"param": param, **state}
        parts = [
            [flat(as_real(entries[key])) if is_flat else as_real(entries[key]) for key in keys]
            for keys in self._part_keys
        ]
        gradient = flat(as_real(grad)) if is_flat else as_real(grad)
        counter, is_flat = state.get("step"), is_flat and self._piece > 0
        count = float(counter) if is_flat and counter is not None else 0.0
        return Piece(parts, gradient, counter, [(rounding, gradient.numel())], is_flat, (index, factor, count))

    def _update_all(self, pieces: Sequence[Piece], groups: Sequence[Group]) -> None:
        """Count the step and update one tensor, part by part, or small ones as one piece."""
        first = pieces[0]
        step = None if first.counter is None else first.counter + 1
        if len(pieces) > 1:
            self._write(pieces, self._updated(uncast(lambda: _joined(pieces)), step, groups), step)
            return
        for part in self._cut(first) if first.is_flat else pieces:
            self._write([part], self._updated(part, step, groups), step)

    def _cut(self, piece: Piece) -> list[Piece]:
        """Parts of a tensor, of `PIECE` elements but for the last."""
        ((rounding, numel),) = piece.spans
        widths = [[part.elements for part in form.parts] for form in self._formats] + [[1]]
        cut = []
        for start in range(0, max(numel, 1), self._piece):
            end = min(start + self._piece, numel)
            parts = [
                [part[start // per : end // per] for part, per in zip(tensors, pers, strict=False)]
                for tensors, pers in zip(piece.parts, widths, strict=True)
            ]
            span = rounding._replace(first=rounding.first + start), end - start
            # Counted with the first part: what is interrupted after it has taken some of the step.
            counter = None if start else piece.counter
            cut.append(piece._replace(parts=parts, grad=piece.grad[start:end], counter=counter, spans=[span]))
        return cut

    def _updated(self, piece: Piece, step: Tensor | None, groups: Sequence[Group]) -> list[Tensor]:
        """What the parts of a piece are to become. Nothing is written yet."""
        index, factor, _ = piece.numbers
        group, formats, (*stored, averages) = groups[index], self._formats, piece.parts
        ready = self._wide(piece.grad)
        if factor != 1:
            ready = ready * factor
        if bound := clip_value(group):
            # What the dtype cannot hold only an infinity exceeds.
            bound = min(bound, torch.finfo(ready.dtype).max)
            ready = ready.clamp(-bound, bound)
        param, *states = [self._wide(form.decode(each)) for form, each in zip(formats, stored, strict=True)]
        param, states = self._algorithm.update(param, ready, states, step, group, self._maths)
        words: list[Tensor] = []
        # A list: an interrupt is lost in a generator that ends early.
        if [form for form in formats if form.stochastic]:
            spans = [
                (rounding._replace(step=0 if step is None else step), numel) for rounding, numel in piece.spans
            ]
            words = [word.view(ready.shape) for word in random_words(spans, ready.device)]
        values, encoded = [param, *states], []
        # What is encoded is freed.
        del param, states
        for place, form in enumerate(formats):
            encoded.append(form.encode(values.pop(0), words[min(place, 1)] if form.stochastic else None))
        for average in averages:
            # Of the parameter as it is stored.
            rounded = [each.to(part.dtype) for each, part in zip(encoded[0], stored[0], strict=True)]
            value, ema = self._wide(formats[0].decode(rounded)), self._wide(average)
            encoded.append((ema + (1 - float(group["ema_decay"])) * (value - ema),))
        return list(chain(*encoded))

    def _write(self, pieces: Sequence[Piece], values: Sequence[Tensor], step: Tensor | None) -> None:
        """Write all parts and counters, in pieces by one call: an interrupt comes before or after it."""
        places: list[Tensor] = []
        sources: list[Tensor] = []
        for value, *same in zip(values, *(chain(*piece.parts) for piece in pieces), strict=True):
            places += same
            if len(same) > 1:
                sources += value.split([place.numel() for place in same])
            else:
                sources.append(value if value.shape == same[0].shape else value.view(same[0].shape))
        for piece in pieces:
            if piece.counter is not None and step is not None:
                places.append(piece.counter)
                sources.append(step.view_as(piece.counter))
        if self._piece:
            torch._foreach_copy_(places, sources)
            return
        for place, source in zip(places, sources, strict=True):
            place.copy_(source)

    def _wide(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the maths; a copy if autograd may keep it."""
        if tensor.dtype != self._dtype:
            return tensor.to(self._dtype)
        return tensor.clone() if torch.is_grad_enabled() else tensor


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Copies of tensors one after the other."""
    parts = [
        [torch.cat(same) for same in zip(*values, strict=True)]
        for values in zip(*(piece.parts for piece in pieces), strict=True)
    ]
    spans = [span for piece in pieces for span in piece.spans]
    return pieces[0]._replace(parts=parts, grad=torch.cat([piece.grad for piece in pieces]), spans=spans)
