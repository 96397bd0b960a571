import gc
import struct
import weakref
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim._table import staging
from dragon.vm.torch.optim._table.staging import StagingRing
from dragon.vm.torch.optim._table.table import DeviceTable, words_of

CPU = torch.device("cpu")

words = st.integers(-(2**63), 2**63 - 1)
sections = st.lists(st.lists(words, max_size=9), min_size=1, max_size=4)


@given(sections, st.data())
def test_a_section_holds_what_was_written_after_the_next_upload(sections, data):
    table = DeviceTable({str(i): array("q", section) for i, section in enumerate(sections)}, CPU)
    table.upload()
    expected = [list(section) for section in sections]
    for _ in range(data.draw(st.integers(0, 3))):
        index = data.draw(st.integers(0, len(sections) - 1))
        # The first words of a section may be written without the others.
        values = data.draw(st.lists(words, max_size=len(sections[index])))
        table.write(str(index), array("q", values))
        expected[index][: len(values)] = values
    table.upload()
    for index, section in enumerate(expected):
        assert table.section(str(index)).tolist()[: len(section)] == section
        assert table.section(str(index)).data_ptr() % 16 == 0 or not section


@given(sections, st.data())
def test_an_upload_copies_all_that_was_written_and_little_else(sections, data):
    table = DeviceTable({str(i): array("q", section) for i, section in enumerate(sections)}, CPU)
    table.upload()
    table.buffer.fill_(-7)
    chosen = data.draw(st.sampled_from(range(len(sections))))
    table.write(str(chosen), array("q", sections[chosen]))
    table.upload()
    for index, section in enumerate(sections):
        copied = section if index == chosen else [-7] * len(section)
        assert table.section(str(index)).tolist()[: len(section)] == copied


def test_each_upload_copies_what_was_written_since_the_last_one():
    table = DeviceTable({name: array("q", [0, 0]) for name in "abc"}, CPU)
    expected = {}
    for number, names in enumerate(("abc", "b", "bc", "b", "c", "bc", "abc")):
        for name in names:
            table.write(name, array("q", [number, -number]))
            expected[name] = [number, -number]
        table.upload()
        assert {name: table.section(name).tolist() for name in "abc"} == expected


@given(st.lists(words, min_size=1, max_size=9))
def test_an_upload_without_a_change_copies_nothing(section):
    table = DeviceTable({"a": array("q", section)}, CPU)
    assert not table.is_uploaded
    table.upload()
    table.upload()
    assert table.n_uploads == 1
    assert table.is_uploaded
    table.write("a", array("q", section))
    assert not table.is_uploaded
    table.upload()
    assert table.n_uploads == 2


@given(st.lists(words, min_size=3, max_size=9))
def test_a_captured_copy_is_another_section_of_these_words(section):
    table = DeviceTable({"a": array("q", section), "b": array("q", section)}, CPU)
    table.upload()
    with torch.device("meta"):
        copy = table.captured_copy("a", array("q", [5, 6]))
    assert copy.tolist()[:2] == [5, 6]
    assert len(copy) == len(table.section("a"))
    assert table.section("a").tolist()[: len(section)] == section
    table.write("a", array("q", [1, 2]))
    table.upload()
    assert copy.tolist()[:2] == [5, 6]


@given(st.lists(st.floats()))
def test_numbers_are_kept_bit_by_bit(numbers):
    assert words_of(array("d", numbers)).tobytes() == struct.pack(f"{len(numbers)}d", *numbers)


@given(st.lists(st.tuples(*[st.integers(0, 2**31 - 1)] * 2)))
def test_pairs_are_kept_bit_by_bit(pairs):
    flat = array("i", [number for pair in pairs for number in pair])
    assert words_of(flat).tobytes() == flat.tobytes()


class FakeDevice:
    """A stream without a GPU: copies wait until `run`, as a device's or a graph's do."""

    def __init__(self, monkeypatch):
        self.copies, self.is_capturing, self.n_queries = [], False, 0
        device = self

        class Event:
            def __init__(self, of):
                self.index = 0

            def record(self):
                assert not device.is_capturing
                self.index = len(device.copies)

            def query(self):
                assert not device.is_capturing, "an event was asked for its state within a capture"
                device.n_queries += 1
                return all(copy is None for copy in device.copies[: self.index])

        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=True, **kwargs: empty(*args, **kwargs))
        monkeypatch.setattr(
            staging, "_copy_to_device", lambda buffer, target: self.copies.append((buffer, target))
        )

    def run(self, n_left=0):
        """Do the copies that wait, in order, but for the last ones."""
        for index, copy in enumerate(self.copies[: len(self.copies) - n_left]):
            if copy is not None:
                copy[1].copy_(copy[0])
                self.copies[index] = None


@pytest.fixture
def fake(monkeypatch):
    return FakeDevice(monkeypatch)


def test_a_buffer_is_not_written_while_its_copy_waits(fake):
    ring, targets = StagingRing(), [torch.zeros(3, dtype=torch.int64) for _ in range(4)]
    for first in (0, 10):
        for number, target in enumerate(targets, first):
            ring.copy(torch.full((3,), number), target)
        fake.run()
        assert [target.tolist() for target in targets] == [[number] * 3 for number in range(first, first + 4)]
    n_slots = sum(map(len, ring._slots.values()))
    for number, target in enumerate(targets):
        ring.copy(torch.full((3,), -number), target)
        fake.run()
        assert target.tolist() == [-number] * 3
    assert sum(map(len, ring._slots.values())) == n_slots


@pytest.mark.parametrize("n_behind", [0, 1, 3])
def test_a_device_that_is_some_copies_behind_needs_a_few_buffers(fake, n_behind):
    ring, targets = StagingRing(), [torch.zeros(n, dtype=torch.int64) for n in (3, 5)]
    for number in range(20):
        for target in targets:
            ring.copy(torch.full_like(target, number), target)
        fake.run(len(targets) * n_behind)
        assert all(target.tolist() == [max(number - n_behind, 0)] * len(target) for target in targets)
    assert [len(slots) for slots in ring._slots.values()] == [n_behind + 1] * 2


def test_a_buffer_that_modes_of_the_caller_surround_is_plain_memory_of_the_host(fake):
    ring, target = StagingRing(), torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode(), torch.device("meta"):
        ring.copy(torch.tensor([2**62 + 1, 2], device="cpu"), target)
        fake.run()
    assert target.tolist() == [2**62 + 1, 2]
    ring.copy(torch.tensor([3, 4]), target)
    fake.run()
    assert target.tolist() == [3, 4]


def test_a_captured_copy_keeps_its_buffer(fake):
    ring, captured, target = StagingRing(), [], torch.zeros(2, dtype=torch.int64)
    ring.copy(torch.tensor([1, 1]), target)
    ring.expect_capture(2)
    # Of the second capture nobody knew.
    for number in (2, 3):
        fake.is_capturing = True
        ring.copy_captured(torch.tensor([number, number]), target)
        captured.append(fake.copies.pop())
        fake.is_capturing = False
    for number in (4, 5, 6):
        ring.copy(torch.tensor([number, number]), target)
        fake.run()
        assert target.tolist() == [number, number]
    assert [buffer.tolist() for buffer, _ in captured] == [[2, 2], [3, 3]]


def test_what_a_graph_reads_outlives_the_optimizer(fake):
    ring = StagingRing()
    ring.expect_capture(2)
    fake.is_capturing = True
    ring.copy_captured(torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int64))
    buffer = weakref.ref(fake.copies.pop()[0])
    del ring
    gc.collect()
    assert buffer() is not None


def test_one_buffer_is_ready_before_a_capture(fake, monkeypatch):
    table = DeviceTable({"a": array("q", [0]), "b": array("q", [0, 0, 0])}, CPU)
    table._ring = StagingRing()

    def refuse(length):
        raise AssertionError("pinned memory was allocated though a buffer is in reserve, or within a capture")

    for words in ([1, 2, 3], [4, 5, 6]):
        table.expect_capture("b")
        with monkeypatch.context() as patch:
            patch.setattr(staging, "_new_buffer", refuse)
            table.expect_capture("b")
            fake.is_capturing = True
            table.captured_copy("b", array("q", words))
        fake.is_capturing = False
        assert fake.copies[-1][0].tolist()[:3] == words
        table.write("b", array("q", [7, 8, 9]))
        table.upload()
