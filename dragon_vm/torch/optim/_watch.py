"""Tensors as they were, and whether they still are: the same memory, in the same layout."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from dragon.vm.torch.optim._gradients import Gradients, addresses_of
from dragon.vm.torch.optim._headers import DTYPE_BITS, MAX_DIM, HeaderMap, header_map
from dragon.vm.torch.optim._memory import Memory, Words, objects, open_memory, positions
from dragon.vm.torch.optim._plain import GradWatch, PlainGradWatch, PlainWatch, Watch, layout

_Pair = tuple[int, int]
# Gradients that stay are asked for once. To know that they are the same they must be held, which keeps them from
# being freed between a `zero_grad(set_to_none=True)` and the next step: only small ones are.
HELD_NBYTES = 1 << 20


class HeaderWatch:
    """A `Watch` that reads headers; it holds the tensors, so that their objects stay alive.

    Args:
        headers: where the words are.
        params: strided, as the others.
        others: further tensors, whose gradients nobody asks for.

    Raises:
        LookupError: if the headers do not say what PyTorch says.
    """

    def __init__(self, headers: HeaderMap, params: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._tensors = tensors = [*params, *others]
        self.have_plain_grads = all(type(param).grad is Tensor.grad for param in params)
        deep = [tensor for tensor in tensors if tensor.dim() > MAX_DIM]
        self._deep = PlainWatch(deep) if deep else None
        # Asked for first: memory that is copied at the next write is copied now.
        addresses = addresses_of(tensors)
        objects_of = Words(objects(tensors) + headers.impl)
        n_tensors = len(tensors)
        pairs = _columns(n_tensors, headers.dtype, headers.storage, headers.offset)
        pairs += _columns(len(params), headers.autograd) + _layouts(headers, tensors)
        described = Words(_Selection(pairs).of(objects_of.words))
        fields = described.words.clone()[n_tensors : 3 * n_tensors + len(params)]
        storages, offsets, self.autograds = fields.split([n_tensors, n_tensors, len(params)])
        if 0 in storages.tolist():
            raise LookupError("a tensor without storage")
        places, which = storages.unique(return_inverse=True)
        memories = Words(_each(positions(places), headers.data, headers.deleter))
        data = memories.words[: len(places)][which]
        if not torch.equal(_addresses(data, offsets, *_sizes(tensors)), addresses):
            raise LookupError("other addresses than data_ptr() returns")
        # In this order: what has not changed points to what is alive.
        self._all = objects_of, described, memories

    def is_unchanged(self) -> bool:
        """Whether all are as they were."""
        with open_memory() as memory:
            same = all(words.read(memory) for words in self._all)
        return same and (self._deep is None or self._deep.is_unchanged())


class HeaderGradWatch:
    """A `GradWatch` that reads headers; it holds gradients of at most `HELD_NBYTES` together.

    Args:
        headers: where the words are.
        params: a watch of the parameters, which must be found unchanged before each use of this one.
        grads: the gradients, strided.

    Raises:
        LookupError: if the headers do not say what PyTorch says.
    """

    _offsets: Tensor
    _memories: Words
    _addresses: Tensor | None

    def __init__(self, headers: HeaderMap, params: HeaderWatch, grads: Gradients) -> None:
        self._headers, self._are_own = headers, grads.are_own
        tensors = grads.tensors
        addresses = addresses_of(tensors)
        if self._are_own and (0 in params.autograds.tolist() or not params.have_plain_grads):
            raise LookupError("a gradient that is not where others are")
        self._pointers = Words(objects(tensors) + headers.impl)
        if self._are_own:
            self._pointers.where = positions(params.autograds) + headers.grad
            with open_memory() as memory:
                if not self._pointers.read(memory):
                    raise LookupError("other gradients than .grad returns")
        layouts = _columns(len(tensors), headers.dtype) + _layouts(headers, tensors)
        self._selection = _Selection(layouts + _columns(len(tensors), headers.storage, headers.offset))
        self._n_layout_words = len(layouts)
        self._described = Words(self._selection.of(self._pointers.words))
        self._layout = self._layout_now()
        self._sizes = _sizes(tensors)
        self._deep = [(i, layout(tensor)) for i, tensor in enumerate(tensors) if tensor.dim() > MAX_DIM]
        self._held: tuple[list[Tensor], Words] | None = None
        self._may_hold = False
        self._locate()
        if not self.find(grads) or not torch.equal(grads.addresses, addresses):
            raise LookupError("other addresses than data_ptr() returns")
        self._may_hold = self._are_own and sum(tensor.nbytes for tensor in tensors) <= HELD_NBYTES

    def find(self, grads: Gradients) -> bool:
        """Whether these gradients are laid out as the remembered ones were; leaves their addresses there."""
        if not self._are_own:
            if any(grad is None for grad in grads.tensors):
                return False
            self._pointers.where = objects(grads.tensors) + self._headers.impl
        with open_memory() as memory:
            # What is kept last is what later steps go by: an interrupt before that leaves them to do it anew.
            if not (are_same := self._pointers.read(memory)):
                self._held = None
                self._described.where = self._selection.of(self._pointers.words)
                self._pointers.keep()
            if not self._described.read(memory):
                if not torch.equal(self._layout_now(), self._layout):
                    return False
                self._locate()
                self._described.keep()
            if not self._memories.read(memory) or self._addresses is None:
                self._addresses = None
                self._memories.keep()
                data, deleters = self._memories.words.view(2, -1).unbind()
                if self._headers.lazy_deleter in deleters.tolist():
                    return False
                self._addresses = _addresses(data, self._offsets, *self._sizes)
            if are_same:
                self._hold(grads, memory)
        grads.addresses = self._addresses
        return all(layout(grads.tensors[i]) == seen for i, seen in self._deep)

    def _hold(self, grads: Gradients, memory: Memory) -> None:
        """Hand out the tensors of the last step, which the pointers say are the same."""
        if not self._may_hold:
            return
        if self._held is None:
            # Nor does a graph that hangs on one of them outlive the step.
            if any(map(attrgetter("requires_grad"), grads.tensors)):
                return
            self._held = grads.tensors, Words(objects(grads.tensors) + self._headers.impl)
        tensors, impls = self._held
        if impls.read(memory):
            grads.tensors = tensors

    def _layout_now(self) -> Tensor:
        words = self._described.words[: self._n_layout_words].clone()
        words[: len(self._pointers.where)] &= DTYPE_BITS
        return words

    def _locate(self) -> None:
        """Derive from descriptions, which are those of strided tensors, where their memories stand."""
        self._addresses = None
        storages, offsets = self._described.words[self._n_layout_words :].view(2, -1).unbind()
        self._offsets = offsets.clone()
        self._memories = Words(_each(positions(storages), self._headers.data, self._headers.deleter))


class _Selection:
    """Words of several objects, as pairs of an object's number and the word in it."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self._owners, self._words = torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)

    def of(self, addresses: Tensor) -> Tensor:
        """Positions of the words, for objects at these addresses."""
        return positions(addresses)[self._owners] + self._words


def _columns(n_objects: int, *words: int) -> list[_Pair]:
    """These words of all objects, word by word."""
    return [(i, word) for word in words for i in range(n_objects)]


def _layouts(headers: HeaderMap, tensors: Sequence[Tensor]) -> list[_Pair]:
    return [(i, word) for i, tensor in enumerate(tensors) for word in headers.layout(tensor.dim())]


def _each(addresses: Tensor, *offsets: int) -> Tensor:
    """Each offset from all addresses, [len(offsets) * len(addresses)]."""
    return torch.cat([addresses + offset for offset in offsets])


def _sizes(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bytes of an element of each tensor, and 1 for those that have any, 0 for the others."""
    sizes = [(tensor.element_size(), tensor.numel() > 0) for tensor in tensors]
    itemsizes, are_full = torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    return itemsizes, are_full


def _addresses(data: Tensor, offsets: Tensor, itemsizes: Tensor, are_full: Tensor) -> Tensor:
    return (data + offsets * itemsizes) * are_full


def watch(params: Sequence[Tensor], others: Sequence[Tensor]) -> Watch:
    """Remember parameters and other strided tensors, by their headers where those can be read."""
    headers = header_map()
    if headers is not None:
        try:
            return HeaderWatch(headers, params, others)
        except LookupError:
            pass
    return PlainWatch([*params, *others])


def watch_grads(params: Watch, grads: Gradients) -> GradWatch:
    """Remember the strided gradients of watched parameters, by their headers where those can be read."""
    headers = header_map()
    if headers is not None and isinstance(params, HeaderWatch):
        try:
            return HeaderGradWatch(headers, params, grads)
        except LookupError:
            pass
    return PlainGradWatch(grads.tensors)
