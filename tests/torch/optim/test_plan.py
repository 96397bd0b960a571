from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim._table.chunks import arena_offsets, plan_chunks

numels = st.lists(st.integers(0, 300), max_size=20)


@given(numels, st.integers(1, 130))
def test_every_element_is_in_exactly_one_chunk(numels, chunk):
    flat = plan_chunks(numels, chunk)
    pairs = list(zip(flat[0::2], flat[1::2], strict=True))
    covered = [
        (row, i) for row, index in pairs for i in range(index * chunk, min((index + 1) * chunk, numels[row]))
    ]
    assert covered == [(row, i) for row, numel in enumerate(numels) for i in range(numel)]


@given(numels, st.integers(1, 130))
def test_no_chunk_is_empty(numels, chunk):
    flat = plan_chunks(numels, chunk)
    assert all(index * chunk < numels[row] for row, index in zip(flat[0::2], flat[1::2], strict=True))


@given(numels, st.sampled_from([1, 2, 4, 8, 16]))
def test_tensors_lie_in_an_arena_aligned_in_order_and_apart(numels, alignment):
    *firsts, end = arena_offsets(numels, alignment)
    assert all(first % alignment == 0 for first in firsts)
    following = [*firsts[1:], end] if firsts else []
    for first, numel, after in zip(firsts, numels, following, strict=True):
        assert first + numel <= after < first + numel + alignment
