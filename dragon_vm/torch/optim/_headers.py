"""Headers of tensors: the words of memory in which PyTorch keeps addresses, layouts and gradients.

Asking a tensor for its address from Python costs more than updating a small tensor; one gather over the headers
of all tensors costs a twentieth of that. PyTorch does not promise where the words are. They are searched for, by
values that its public calls report; where they are not found, or what they say is not so, public calls must do.

A word is read only of an object that is alive: the Python object that the caller holds, what that one points to at
this moment, and so on.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._memory import WORD, open_memory, word_at, words_at

# How far a word is searched for. A TensorImpl ends with its dispatch keys, which the other searches do not pass.
_NEAR, _FAR = 8, 32
# The bits of a word that hold the number of a dtype; those above may be anything, even in equal tensors.
DTYPE_BITS = (1 << 16) - 1
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool)
# Dimensions whose sizes and strides stand in the header itself.
MAX_DIM = 5


class HeaderMap(NamedTuple):
    """Where the words are, counted from the start of what they belong to.

    Attributes:
        impl: the address of the TensorImpl, in a tensor's Python object.
        storage: the address of the StorageImpl, in a TensorImpl, as what follows.
        autograd: the address of the AutogradMeta; 0 for none.
        dim: the number of dimensions.
        sizes: the first size.
        strides: the first stride.
        offset: the offset in the storage, in elements.
        dtype: the number of the dtype in its lowest 16 bits, and other things above those.
        keys: the dispatch keys, which stand for device type, layout and conjugation.
        grad: the address of the gradient's TensorImpl, in an AutogradMeta.
        data: the address of the memory, in a StorageImpl, as what follows.
        deleter: who frees the memory.
        lazy_deleter: the deleter of memory that is copied at the next write.
    """

    impl: int
    storage: int
    autograd: int
    dim: int
    sizes: int
    strides: int
    offset: int
    dtype: int
    keys: int
    grad: int
    data: int
    deleter: int
    lazy_deleter: int

    def layout(self, dim: int) -> list[int]:
        """The words that say how a tensor of so many dimensions is laid out, but for its dtype and offset.

        Above `MAX_DIM`, sizes and strides stand elsewhere.
        """
        dim = dim if dim <= MAX_DIM else 0
        sizes, strides = range(self.sizes, self.sizes + dim), range(self.strides, self.strides + dim)
        return [self.dim, *sizes, *strides, self.keys]


def header_map() -> HeaderMap | None:
    """Where this PyTorch keeps the words; None if they are not found."""
    try:
        return _found()
    except (AttributeError, LookupError, RuntimeError):
        return None


@cache
def _found() -> HeaderMap:
    """What was found; a failure is not kept, for the next search may be elsewhere."""
    with open_memory():
        return _search()


def _find(address: int, value: int, length: int) -> int:
    """Which of the first words at an address has this value; reads no further.

    Raises:
        LookupError: if none of the first `length` has.
    """
    for index in range(length):
        if word_at(address + WORD * index) == value:
            return index
    raise LookupError(f"none of {length} words is {value}")


def _search() -> HeaderMap:
    sizes, strides, offset = (3, 5, 7, 11, 13), (19, 23, 29, 31, 37), 17
    tensor: Any = torch.empty(5000, device="cpu").as_strided(sizes, strides, offset)
    storage = tensor.untyped_storage()
    impl = tensor._cdata
    # The last word of a TensorImpl comes first, so that the other searches end there.
    keys = _find(impl, torch._C._dispatch_keys(tensor).raw_repr(), _FAR)
    first, numel = _find(impl, sizes[0], keys), _find(impl, tensor.numel(), keys)
    if words_at(impl + WORD * (first - 1), 1 + 2 * MAX_DIM) != [MAX_DIM, *sizes, *strides]:
        raise LookupError("sizes and strides stand otherwise")
    autograd, grad = _search_grad(keys)
    data, deleter, lazy_deleter = _search_memory(tensor)
    return HeaderMap(
        impl=_find(id(tensor), impl, 5),
        storage=_find(impl, storage._cdata, keys),
        autograd=autograd,
        dim=first - 1,
        sizes=first,
        strides=first + MAX_DIM,
        offset=_find(impl, offset, keys),
        dtype=_search_dtype(numel + 1, keys),
        keys=keys,
        grad=grad,
        data=data,
        deleter=deleter,
        lazy_deleter=lazy_deleter,
    )


def _search_dtype(first: int, end: int) -> int:
    """Which word of a TensorImpl has a number for each dtype."""
    for index in range(first, end):
        tensors: Any = [torch.empty(0, dtype=dtype, device="cpu") for dtype in _DTYPES * 2]
        numbers = [word_at(tensor._cdata + WORD * index) & DTYPE_BITS for tensor in tensors]
        if numbers[: len(_DTYPES)] == numbers[len(_DTYPES) :] and len(set(numbers)) == len(_DTYPES):
            return index
    raise LookupError("no word tells dtypes apart")


def _search_grad(length: int) -> tuple[int, int]:
    """Where a TensorImpl of `length` words keeps its AutogradMeta, and where that keeps the gradient."""
    param, gradient = torch.empty(3, device="cpu"), torch.empty(3, device="cpu")
    impl, expected = param._cdata, gradient._cdata
    before = words_at(impl, length)
    param.requires_grad_()
    changed = [index for index, word in enumerate(words_at(impl, length)) if word != before[index]]
    if len(changed) != 1 or before[changed[0]] != 0:
        raise LookupError("requires_grad does not make one word appear")
    meta = word_at(impl + WORD * changed[0])
    param.grad = gradient
    grad = _find(meta, expected, _NEAR)
    param.grad = None
    if word_at(meta + WORD * grad) == expected:
        raise LookupError("a gradient stays that was dropped")
    return changed[0], grad


def _search_memory(tensor: Tensor) -> tuple[int, int, int]:
    """Where a StorageImpl keeps the memory and its deleter, and which that is while a copy waits for a write."""
    storage: Any = tensor.untyped_storage()
    data = _find(storage._cdata, storage.data_ptr(), _NEAR)
    before = words_at(storage._cdata, data + 2)
    copy = torch._lazy_clone(tensor)
    changed = [index for index, word in enumerate(words_at(storage._cdata, data + 2)) if word != before[index]]
    del copy
    if changed != [data + 1]:
        raise LookupError("the deleter does not follow the memory")
    return data, data + 1, word_at(storage._cdata + WORD * (data + 1))
