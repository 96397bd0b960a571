"""The words of headers are searched for, and what is not found is not used."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dragon.vm.torch.optim import Adam, _headers
from dragon.vm.torch.optim._containers import container_map
from dragon.vm.torch.optim._headers import header_map
from dragon.vm.torch.optim._memory import Words, objects, positions

# Nobody has a tensor of so many elements: only all of memory is as long.
HUGE = 1 << 40


@pytest.fixture
def searched_anew():
    for search in (_headers._found, container_map):
        search.cache_clear()
    yield
    for search in (_headers._found, container_map):
        search.cache_clear()


def sees_all_of_memory(operands):
    return any(isinstance(operand, torch.Tensor) and operand.numel() > HUGE for operand in operands)


class FunctionSpy(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert not sees_all_of_memory(args)
        return function(*args, **(kwargs or {}))


class DispatchSpy(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not sees_all_of_memory(args)
        return function(*args, **(kwargs or {}))


def test_words_are_what_pytorch_says():
    headers = header_map()
    tensor = torch.zeros(40).as_strided((2, 3), (7, 2), 5).requires_grad_()
    tensor.grad = torch.ones(2, 3)
    impl = Words(objects([tensor]) + headers.impl).words
    assert impl.item() == tensor._cdata

    def word(offset, of=impl):
        return Words(positions(of) + offset).words

    assert word(headers.storage).item() == tensor.untyped_storage()._cdata
    assert word(headers.offset).item() == 5
    assert [word(offset).item() for offset in headers.layout(2)[:-1]] == [2, 2, 3, 7, 2]
    assert word(headers.grad, word(headers.autograd)).item() == tensor.grad._cdata
    assert word(headers.data, word(headers.storage)).item() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("spy", [FunctionSpy, DispatchSpy])
def test_no_mode_sees_all_of_memory(spy, searched_anew):
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = Adam(params)
    with spy():
        for _ in range(3):
            for param in params:
                param.grad = torch.ones(3)
            optimizer.step()
    assert header_map() is not None
    assert optimizer._numbers.are_unchanged(optimizer.param_groups)


@pytest.mark.parametrize(
    "surroundings",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), torch._C.DisableTorchFunctionSubclass],
    ids=["inference mode", "no grad", "default device", "no subclasses"],
)
def test_the_first_search_may_be_anywhere(surroundings, searched_anew):
    expected = header_map()
    assert expected is not None
    _headers._found.cache_clear()
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = Adam(params)
    with surroundings():
        assert header_map() == expected
        for _ in range(3):
            optimizer.step()
    prepared = optimizer._prepared.latest()
    for _ in range(3):
        optimizer.step()
    assert optimizer._prepared.latest() == prepared


@pytest.mark.parametrize("search", ["_find", "words_at", "_search_grad", "_search_dtype", "_search_memory"])
@pytest.mark.parametrize("error", [LookupError, AttributeError, RuntimeError])
def test_whatever_is_not_found_leaves_public_calls(search, error, monkeypatch, searched_anew):
    def fail(*_):
        raise error("not there")

    monkeypatch.setattr(_headers, search, fail)
    assert header_map() is None


def test_a_word_is_searched_no_further_than_where_it_is(monkeypatch):
    read = []
    monkeypatch.setattr(_headers, "word_at", lambda address: read.append(address) or address)
    assert _headers._find(800, 816, 10) == 2
    assert read == [800, 808, 816]
    with pytest.raises(LookupError, match="none of 3 words is 1"):
        _headers._find(800, 1, 3)
