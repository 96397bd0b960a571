from array import array

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dragon.kernels import table
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._algorithms.adam import ADAM
from dragon.vm.torch.optim._options import Settings, complete
from dragon.vm.torch.optim._table.group_table import GroupTable
from dragon.vm.torch.optim._table.table import DeviceTable

# No kernel runs: any device will do whose tensors the host does not read.
DEVICE = torch.device("meta")
N_GROUPS = 2
# Both at address 0.
NARROW = torch.zeros((), dtype=torch.float32, device=DEVICE)
WIDE = torch.zeros((), dtype=torch.float64, device=DEVICE)


def new_groups():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(N_GROUPS)]
    groups = Adam([{"params": [param]} for param in params], epsilon_hat=False).param_groups
    return [{**complete(group, ADAM.own_defaults), "betas": (0.5, NARROW)} for group in groups]


def new_tables(device=DEVICE):
    columns = {"groups": int(table.GROUP_COLUMNS), "sources": int(table.SOURCE_COLUMNS)}
    sections = {name: array("q", [-1] * N_GROUPS * width) for name, width in columns.items()}
    device_table = DeviceTable(sections, torch.device("cpu"))
    return device_table, GroupTable(device_table, device, ADAM.columns, Settings())


def uploaded(device_table):
    device_table.upload()
    return [device_table.section(name).tolist() for name in ("groups", "sources")]


def fresh(groups):
    """What a table has that these groups are the first to be written to."""
    device_table, written = new_tables()
    written.write(groups, (0, 0))
    return uploaded(device_table)


changes = st.one_of(
    st.tuples(st.just("lr"), st.sampled_from([0.125, 0.25])),
    st.tuples(st.just("lr"), st.sampled_from([0.125, 0.25])),
    st.tuples(st.just("betas"), st.sampled_from([(0.5, 0.75), (0.5, NARROW), (0.5, WIDE)])),
    st.tuples(st.just("weight_decay"), st.sampled_from([0.0, 0.5])),
    st.tuples(st.just("foreach"), st.sampled_from([None, False])),
)


# A rate returns that a step has changed alone.
@example([(0, ("lr", 0.5), True), (0, ("foreach", 1), False), (0, ("lr", 0.25), False), (0, ("lr", 0.5), True)])
@given(st.lists(st.tuples(st.integers(0, N_GROUPS - 1), changes, st.booleans()), max_size=8))
def test_kernels_read_the_hyperparameters_of_now_whatever_came_before(history):
    (device_table, written), groups, version = new_tables(), new_groups(), (0, 0)
    written.write(groups, version)
    for index, (name, value), is_published in history:
        groups[index][name] = value
        version = (version[0], version[1] + 1) if name == "lr" else (version[0] + 1, version[1])
        if is_published:
            assert all(written.write_one(index, group) for index, group in enumerate(groups))
        else:
            written.write(groups, version)
        assert uploaded(device_table) == fresh(groups)


# A rate, another number, and a tensor in place of a tensor.
changed = pytest.mark.parametrize("change", [{"lr": 0.5}, {"weight_decay": 0.5}, {"betas": (0.5, WIDE)}], ids=str)


@changed
def test_numbers_that_return_behind_an_interrupted_write_are_written(change, monkeypatch):
    (device_table, written), groups = new_tables(), new_groups()
    written.write(groups, (0, 0))
    write, before = device_table.write, dict(groups[1])

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    groups[1].update(change)
    monkeypatch.setattr(device_table, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written.write(groups, (0, 1) if "lr" in change else (1, 0))
    monkeypatch.undo()
    groups[1].update(before)
    written.write(groups, (0, 2) if "lr" in change else (2, 0))
    assert uploaded(device_table) == fresh(groups)


@changed
def test_a_group_may_be_written_between_steps(change):
    (device_table, written), groups = new_tables(), new_groups()
    assert not any(written.write_one(index, group) for index, group in enumerate(groups))
    written.write(groups, (0, 0))
    groups[1].update(change)
    assert written.write_one(1, groups[1])
    assert uploaded(device_table) == fresh(groups)


def test_a_tensor_on_the_device_is_read_by_its_address_with_a_bit_for_fp64():
    groups = new_groups()
    far = torch.zeros(9, dtype=torch.float64, device=DEVICE)[8]
    assert far.data_ptr() == 64
    groups[0].update(lr=far, betas=(NARROW, WIDE))
    assert fresh(groups)[1] == [65, 0, 1, 0, 0, 0]


def test_a_tensor_on_the_host_is_read_by_its_number():
    groups, same = new_groups(), new_groups()
    groups[0].update(lr=torch.tensor(0.25), betas=(torch.tensor(0.5), torch.tensor(0.75)))
    same[0].update(lr=0.25, betas=(0.5, 0.75))
    assert fresh(groups) == fresh(same)


@pytest.mark.parametrize(("device", "dtype"), [(DEVICE, torch.float16), (torch.device("cuda", 1), torch.float32)])
def test_a_tensor_that_kernels_cannot_read_is_refused_before_anything_is_written(device, dtype):
    device_table, written = new_tables(device)
    groups = [{**group, "betas": (0.5, 0.5)} for group in new_groups()]
    before = uploaded(device_table)
    groups[1]["lr"] = torch.zeros((), dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"lr must be a number, or a float32 or float64 tensor on {device}"):
        written.write(groups, (0, 0))
    assert uploaded(device_table) == before
