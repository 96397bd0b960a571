from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim._table.chunks import n_chunks, plan_chunks

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


@given(numels, st.integers(1, 130))
def test_a_tensor_has_as_many_chunks_as_it_is_said_to_have(numels, chunk):
    rows = plan_chunks(numels, chunk)[0::2]
    assert [rows.count(row) for row in range(len(numels))] == [n_chunks(numel, chunk) for numel in numels]


@given(numels, st.integers(1, 130), st.integers(0, 50))
def test_chunks_name_the_rows_that_their_tensors_have(numels, chunk, first):
    flat, moved = plan_chunks(numels, chunk), plan_chunks(numels, chunk, range(first, first + len(numels)))
    assert [row + first for row in flat[0::2]] == list(moved[0::2])
    assert flat[1::2] == moved[1::2]
