import struct
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import _table
from dragon.vm.torch.optim._table.table import DeviceTable, StagingRing, words_of

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
        width = data.draw(st.integers(1, 3))
        column = data.draw(st.integers(0, min(width, size) - 1))
        n_values = len(range(column, size, width))
        values = data.draw(st.lists(words, min_size=n_values, max_size=n_values))
        if width == 1:
            table.write(index, array("q", values))
        else:
            table.write_column(index, torch.tensor(values, dtype=torch.int64), column, width)
        expected[index][column::width] = values
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


class FakeDevice:
    """A stream without a GPU: copies wait until `run`, as a device's or a graph's do."""

    def __init__(self, monkeypatch):
        self.copies, self.is_capturing, self.n_queries = [], False, 0
        device = self

        class Event:
            def __init__(self):
                self.index = 0

            def record(self):
                assert not device.is_capturing
                self.index = len(device.copies)

            def query(self):
                assert not device.is_capturing, "an event was asked for its state within a capture"
                device.n_queries += 1
                return all(copy is None for copy in device.copies[: self.index])

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(StagingRing, "_new_buffer", lambda _, length: torch.empty(length, dtype=torch.int64))
        monkeypatch.setattr(
            _table, "_copy_to_device", lambda staging, target: self.copies.append((staging, target))
        )

    def run(self):
        """Do the copies that wait, in order."""
        for index, copy in enumerate(self.copies):
            if copy is not None:
                copy[1].copy_(copy[0])
                self.copies[index] = None


@pytest.fixture
def fake(monkeypatch):
    return FakeDevice(monkeypatch)


def test_a_buffer_is_not_written_while_its_copy_waits(fake):
    ring, targets = StagingRing(3), [torch.zeros(3, dtype=torch.int64) for _ in range(4)]
    for number, target in enumerate(targets):
        ring.copy(torch.full((3,), number), target)
    fake.run()
    assert [target.tolist() for target in targets] == [[number] * 3 for number in range(4)]
    n_slots = sum(map(len, ring._slots.values()))
    for number, target in enumerate(targets):
        ring.copy(torch.full((3,), -number), target)
        fake.run()
        assert target.tolist() == [-number] * 3
    assert sum(map(len, ring._slots.values())) == n_slots


def test_a_captured_copy_keeps_its_buffer(fake):
    ring, captured, target = StagingRing(2), [], torch.zeros(2, dtype=torch.int64)
    ring.copy(torch.tensor([1, 1]), target)
    for number in (2, 3):
        fake.is_capturing = True
        ring.copy(torch.tensor([number, number]), target)
        captured.append(fake.copies.pop())
        fake.is_capturing = False
    for number in (4, 5, 6):
        ring.copy(torch.tensor([number, number]), target)
        fake.run()
        assert target.tolist() == [number, number]
    assert [staging.tolist() for staging, _ in captured] == [[2, 2], [3, 3]]


def test_a_buffer_is_ready_before_a_capture(fake, monkeypatch):
    ring, target = StagingRing(2), torch.zeros(2, dtype=torch.int64)

    def refuse(ring, length):
        raise AssertionError("pinned memory was allocated within a capture")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(StagingRing, "_new_buffer", refuse)
            fake.is_capturing = True
            ring.copy(torch.tensor([1, 2]), target)
        fake.is_capturing = False
        ring.copy(torch.tensor([3, 4]), target)


def test_a_twin_has_the_same_words_elsewhere():
    table = DeviceTable([array("q", [1, 2]), array("q", [3])], torch.device("cpu"))
    table.upload()
    twin = table.twin()
    twin.write(0, array("q", [7, 8]))
    twin.upload()
    table.upload()
    assert table.section(0, torch.int64).tolist() == [1, 2]
    assert twin.section(0, torch.int64).tolist() == [7, 8]
    assert twin.section(1, torch.int64).tolist()[:1] == [3]
