"""The numbering of partial norms, on which the last bits of a norm depend."""

from array import array
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.kernels import table
from dragon.vm.torch.optim._backends.partials import SPAN, PartialNorms, Partials
from dragon.vm.torch.optim._table.table import DeviceTable

COLUMNS = int(table.TENSOR_COLUMNS)


@st.composite
def rows(draw):
    """Positions of the rows of a table among the parameters, their elements, and some sets of absent gradients."""
    n = draw(st.integers(1, 5))
    numels = st.sampled_from([1, SPAN, SPAN + 1, 3 * SPAN])
    absent = st.just([]) | st.lists(st.booleans(), min_size=n, max_size=n)
    return draw(st.permutations(range(n))), draw(st.lists(numels, min_size=n, max_size=n)), draw(st.lists(absent))


@given(rows())
def test_rows_with_a_gradient_come_first_in_the_order_of_the_parameters(drawn):
    positions, numels, absents = drawn
    for absent in absents:
        found = PartialNorms.of(positions, numels, absent)
        flags = absent or [False] * len(numels)
        order = sorted(range(len(numels)), key=lambda row: (flags[row], positions[row]))
        assert found.rows == [row for row in order if not flags[row]]
        assert found.counts == [found.ends[row] - found.firsts[row] for row in found.rows]
        end = 0
        for row in order:
            assert found.firsts[row] == end
            end += -(-numels[row] // SPAN)
            assert found.ends[row] == end


def new_tables(positions, numels):
    rows = array("q", bytes(8 * len(numels) * COLUMNS))
    device_table = DeviceTable({"counts": array("q", [0, 0]), "tensors": rows}, torch.device("cpu"))
    return device_table, Partials(positions, numels, device_table)


def told(device_table):
    """What kernels are told: where the partial norms of each row are, and how many rows and norms there are."""
    device_table.upload()
    columns = device_table.section("tensors").view(-1, COLUMNS).unbind(1)
    return [
        columns[int(table.FIRST_PARTIAL)].tolist(),
        columns[int(table.END_PARTIAL)].tolist(),
        device_table.section("counts").tolist(),
    ]


@pytest.mark.parametrize("n_written", [None, 0, 1, 2])
@given(rows())
def test_kernels_and_sums_follow_each_set_of_gradients_also_behind_an_interrupt(n_written, drawn):
    positions, numels, absents = drawn
    device_table, partials = new_tables(positions, numels)
    write = device_table.write
    for absent in absents:
        written = []

        def write_some(*args, written=written):
            write(*args)
            written.append(args)
            if len(written) - 1 == n_written:
                raise KeyboardInterrupt

        device_table.write = write_some
        with suppress(KeyboardInterrupt):
            partials.number([not each for each in absent] or [True] * len(numels))
        device_table.write = write
        partials.number(absent)
        expected = PartialNorms.of(positions, numels, absent)
        assert told(device_table) == [
            *map(list, (expected.firsts, expected.ends)),
            [len(numels), sum(expected.counts)],
        ]
        sums = partials.sums(device_table.section("tensors"))
        assert sums._counts.tolist() == expected.counts
        # One sum in place of the partial norms of each row that has a gradient.
        by_row = sums._by_row.view(-1, COLUMNS)
        ends = [expected.rows.index(row) + 1 if row in expected.rows else 0 for row in range(len(numels))]
        assert by_row[:, int(table.END_PARTIAL)].tolist() == ends
        assert by_row[:, int(table.FIRST_PARTIAL)].tolist() == [max(end - 1, 0) for end in ends]
