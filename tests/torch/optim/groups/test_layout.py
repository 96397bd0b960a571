import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import DENSE_LAYOUTS, GRADIENT_LAYOUTS, GradientCase, tensor_cases
from dragon.vm.torch.optim._groups.layout import (
    in_layout_of,
    is_dense,
    is_stray,
    lies_like,
    overlapping_pair,
    same_walk,
)

BYTES, DTYPES = bytearray(2000), (torch.float32, torch.bfloat16, torch.complex64)


def view(shape, strides, dtype, offset):
    """A view of the same bytes as any other. It may begin within an element of them."""
    whole = torch.frombuffer(BYTES, dtype=dtype, offset=offset, count=100)
    return whole.as_strided(shape, strides[: len(shape)])


views = st.builds(
    view,
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.tuples(*[st.integers(0, 8)] * 3),
    st.sampled_from(DTYPES),
    st.sampled_from(range(0, 800, 8)),
)


def addresses(tensor):
    """Bytes of memory of each element, in the order of the indices."""
    size = tensor.element_size()
    places = torch.arange(10_000).as_strided(tensor.shape, tensor.stride()).flatten().tolist()
    return [(tensor.data_ptr() + place * size + byte) for place in places for byte in range(size)]


def walk(tensor):
    """The elements of a dense tensor in the order of their memory, by their place in the order of the indices."""
    return torch.arange(tensor.numel()).as_strided(tensor.shape, tensor.stride()).flatten().argsort().tolist()


@given(views)
def test_dense_is_one_block_of_memory_with_each_element_once(tensor):
    places = sorted(addresses(tensor))
    assert is_dense(tensor) == (places == [tensor.data_ptr() + byte for byte in range(len(places))])


@given(st.lists(st.integers(0, 3), max_size=4), st.data())
def test_tensors_are_walked_alike_if_their_elements_lie_in_one_order(shape, data):
    dims = range(len(shape))
    orders = [data.draw(st.permutations(dims)) for _ in range(2)]
    tensor, other = (
        torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in dims]) for order in orders
    )
    # The stride of a dimension with one element tells nothing.
    strides = [data.draw(st.integers(0, 9)) if shape[dim] == 1 else tensor.stride(dim) for dim in dims]
    tensor = tensor.as_strided(shape, strides)
    assert lies_like(tensor, other) == same_walk(tensor, other) == (walk(tensor) == walk(other))
    assert is_stray(other, tensor) == (walk(tensor) != walk(other))
    spread = torch.empty([*shape, 2])[..., 0]
    assert lies_like(spread, other) == (spread.numel() <= 1)
    assert not is_stray(spread, other)


@given(tensor_cases(layouts=DENSE_LAYOUTS), st.sampled_from(GRADIENT_LAYOUTS), st.sampled_from(DTYPES))
def test_a_tensor_brought_to_a_layout_is_walked_as_it(case, layout, dtype):
    param = case.build().tensor
    tensor = GradientCase(seed=1, binade=0, layout=layout, dtype=dtype).build(param).tensor
    ready = in_layout_of(param, tensor)
    assert torch.equal(ready, tensor)
    assert ready.dtype == dtype
    assert is_dense(ready)
    assert walk(ready) == walk(param)
    assert same_walk(ready, param)
    assert in_layout_of(param, ready) is ready
    assert (ready is tensor) == (is_dense(tensor) and walk(tensor) == walk(param))


@given(st.lists(views, min_size=1, max_size=4))
def test_elements_that_stand_twice_are_found(tensors):
    places = [place for tensor in tensors for place in addresses(tensor)]
    pair = overlapping_pair(tensors)
    assert (pair is not None) == (len(set(places)) < len(places))
    if pair is not None:
        first, second = (addresses(tensors[index]) for index in pair)
        assert len(set(first)) < len(first) if pair[0] == pair[1] else set(first) & set(second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("its", DTYPES)
def test_elements_that_share_a_byte_are_found(dtype, its):
    tensor = view((2,), (2,), dtype, 40)
    for offset in range(80):
        other = view((2,), (1,), its, offset)
        shared = set(addresses(tensor)) & set(addresses(other))
        assert (overlapping_pair([other, tensor]) is not None) == bool(shared), offset
