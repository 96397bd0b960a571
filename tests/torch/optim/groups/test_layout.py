import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import DENSE_LAYOUTS, GRADIENT_LAYOUTS, GradientCase, tensor_cases
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense, overlapping_pair, same_walk

views = st.builds(
    lambda shape, strides, offset: torch.zeros(200).as_strided(shape, strides[: len(shape)], offset),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.tuples(*[st.integers(0, 8)] * 3),
    st.integers(0, 5),
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
    assert is_dense(tensor) == (places == list(range(places[0], places[0] + len(places))) if places else True)


@given(tensor_cases(layouts=DENSE_LAYOUTS), st.sampled_from(GRADIENT_LAYOUTS))
def test_a_tensor_brought_to_a_layout_is_walked_as_it(case, layout):
    param = case.build().tensor
    tensor = GradientCase(seed=1, binade=0, layout=layout).build(param).tensor
    ready = in_layout_of(param, tensor)
    assert torch.equal(ready, tensor)
    assert is_dense(ready)
    assert walk(ready) == walk(param)
    assert same_walk(ready, param)
    assert in_layout_of(param, ready) is ready
    assert (ready is tensor) == (is_dense(tensor) and walk(tensor) == walk(param))


@given(st.lists(views, min_size=1, max_size=4), st.data())
def test_elements_that_stand_twice_are_found(tensors, data):
    if data.draw(st.booleans()):
        # The views of a list share no buffer until one of them is taken again, from another element on.
        again = data.draw(st.sampled_from(tensors)).flatten()
        tensors = [*tensors, again[data.draw(st.integers(0, max(again.numel() - 1, 0))) :]]
    places = [place for tensor in tensors for place in addresses(tensor)]
    pair = overlapping_pair(tensors)
    assert (pair is not None) == (len(set(places)) < len(places))
    if pair is not None:
        first, second = (addresses(tensors[index]) for index in pair)
        assert len(set(first)) < len(first) if pair[0] == pair[1] else set(first) & set(second)


def test_elements_of_two_dtypes_that_share_a_byte_are_found():
    whole = torch.zeros(4)
    assert overlapping_pair([whole[:2], whole.view(torch.bfloat16)[3:]]) == (0, 1)
    assert overlapping_pair([whole[:2], whole.view(torch.bfloat16)[4:]]) is None
