import struct
from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim._table import DeviceTable, words_of

words = st.integers(-(2**63), 2**63 - 1)
sections = st.lists(st.lists(words, max_size=9), min_size=1, max_size=4)


@given(sections, st.data())
def test_a_section_holds_what_was_written_after_the_next_upload(sections, data):
    table = DeviceTable([array("q", section) for section in sections], torch.device("cpu"))
    table.upload()
    expected = [list(section) for section in sections]
    for _ in range(data.draw(st.integers(0, 3))):
        index = data.draw(st.integers(0, len(sections) - 1))
        size = len(sections[index])
        if not size:
            continue
        start, step = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 3))
        values = data.draw(
            st.lists(words, min_size=len(range(start, size, step)), max_size=len(range(start, size, step)))
        )
        table.write(index, array("q", values), start, step)
        expected[index][start::step] = values
    table.upload()
    for index, section in enumerate(expected):
        assert table.section(index, torch.int64).tolist()[: len(section)] == section
        assert table.section(index, torch.int64).data_ptr() % 16 == 0 or not section


@given(st.lists(words, min_size=1, max_size=9))
def test_an_upload_without_a_change_copies_nothing(section):
    table = DeviceTable([array("q", section)], torch.device("cpu"))
    table.upload()
    table.upload()
    assert table.n_uploads == 1
    table.write(0, array("q", section))
    table.upload()
    assert table.n_uploads == 2


@given(st.lists(st.floats()))
def test_numbers_are_kept_bit_by_bit(numbers):
    assert words_of(numbers).tobytes() == struct.pack(f"{len(numbers)}d", *numbers)
