"""Hyperparameters are read at each step, and have a new version when, and only when, one of them changed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dragon.vm.torch.optim._groups import bounds
from dragon.vm.torch.optim._options import by_value
from dragon.vm.torch.optim._plan import hyperparameters
from dragon.vm.torch.optim._plan.hyperparameters import Hyperparameters

from ..memory.modes import MODES, give_gradients, make

NAMES = ("lr", "betas", "maximize", "foreach")


def group(**changes):
    return {"params": [], "lr": 0.1, "betas": (0.9, 0.99), "maximize": False, "foreach": None, **changes}


def reader():
    return Hyperparameters(NAMES, {"clip_norm": 0.0, "bound_betas": None}, lambda group: group["maximize"])


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.update(lr=0.2),
        lambda g: g.update(lr=torch.tensor(0.2)),
        lambda g: g.update(lr=np.array(0.2)),
        lambda g: g.update(lr=np.float32(0.2)),
        lambda g: g.update(betas=[0.9, 0.5]),
        lambda g: g.update(betas=(torch.tensor(0.9), torch.tensor(0.5))),
        lambda g: g.update(maximize=True),
        lambda g: g.update(foreach=False),
        lambda g: g.update(clip_norm=1.0),
        lambda g: g.update(bound_betas=(0.9, 0.9)),
        lambda g: g.update(bound_betas=[0.9, 0.9, 7.3]),
    ],
)
def test_what_changed_is_read(change):
    values, groups = reader(), [group(), group()]
    values.read(groups)
    first = values.version
    values.read(groups)
    assert values.version == first
    change(groups[1])
    values.read(groups)
    assert values.version > first
    second = values.version
    values.read(groups)
    assert values.version == second


@pytest.mark.parametrize(
    ("value", "write"),
    [
        ({"betas": [0.9, 0.99]}, lambda g: g["betas"].__setitem__(1, 0.5)),
        ({"lr": torch.tensor(0.1)}, lambda g: g["lr"].fill_(0.5)),
        ({"lr": np.array(0.1)}, lambda g: g["lr"].fill(0.5)),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99))}, lambda g: g["betas"][0].fill_(0.5)),
    ],
    ids=["list", "tensor", "array without dimensions", "tuple of tensors"],
)
def test_what_is_written_in_place_is_read(value, write):
    values, groups = reader(), [group(), group(**value)]
    values.read(groups)
    values.read(groups)
    first = values.version
    write(groups[1])
    values.read(groups)
    assert values.version > first


edits = st.tuples(
    st.integers(0, 1),
    st.sampled_from(["lr", "lr", "clip_norm", "foreach"]),
    st.sampled_from(["number", "tensor", "written"]),
    st.sampled_from([0.25, 0.5]),
)


@settings(max_examples=200)
@given(st.lists(edits, min_size=2, max_size=8))
def test_whatever_is_edited_is_read_as_if_for_the_first_time(history):
    values, groups = reader(), [group(lr=0.25, foreach=0.5, clip_norm=0.5) for _ in range(2)]
    values.read(groups)
    for index, name, edit, number in history:
        before, version, old = numbers_of(values), values.version, groups[index][name]
        is_tensor = isinstance(old, torch.Tensor)
        if edit == "written" and is_tensor:
            old.fill_(number)
        else:
            groups[index][name] = number if edit == "number" else torch.tensor(number)
            if is_tensor:
                # It is no hyperparameter any more.
                old.fill_(0.75)
        values.read(groups)
        fresh = reader()
        fresh.read(groups)
        assert numbers_of(values) == numbers_of(fresh)
        assert numbers_of(values) == before or values.version > version


def numbers_of(values):
    return [[float(each[name]) for name in ("lr", "clip_norm", "foreach")] for each in values.groups]


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.append(group()),
        lambda groups: groups.pop(),
        lambda groups: groups.reverse(),
        lambda groups: groups.__setitem__(0, group(lr=0.7)),
    ],
    ids=["appended", "taken away", "reversed", "replaced"],
)
def test_other_groups_are_read(change):
    values, groups = reader(), [group(), group(lr=0.3)]
    values.read(groups)
    first = values.version
    change(groups)
    values.read(groups)
    assert values.version > first


def test_an_own_option_that_a_group_does_not_hold_has_its_default():
    values, groups = reader(), [group(), group(clip_norm=0.0)]
    values.read(groups)
    assert [complete["clip_norm"] for complete in values.groups] == [0.0, 0.0]
    assert "clip_norm" not in groups[0]
    first = values.version
    groups[0]["clip_norm"] = groups[1].pop("clip_norm")
    values.read(groups)
    assert values.version == first


@pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_a_steady_step_of_a_memory_mode_compares_values_as_they_are(mode, monkeypatch):
    """Whatever must be looked into takes several times as long."""
    params, optimizer = make(mode)
    give_gradients(params, 1)
    optimizer.step()
    looked_into = []
    monkeypatch.setattr(hyperparameters, "by_value", lambda value: looked_into.append(value) or by_value(value))
    monkeypatch.setattr(bounds, "moment_bound", looked_into.append)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    assert bool(looked_into) == isinstance(optimizer.param_groups[0].get("state_dtype"), dict)


def test_the_structure_is_new_only_where_a_group_says_so():
    values, groups = reader(), [group(), group()]
    values.read(groups)
    first = values.structure
    groups[0]["lr"] = 0.5
    values.read(groups)
    assert values.structure == first
    groups[0]["maximize"] = True
    values.read(groups)
    assert values.structure > first


@pytest.mark.parametrize(
    ("name", "bad", "error", "text"),
    [
        ("lr", "fast", TypeError, "lr must be a number, but got 'fast'"),
        ("lr", torch.ones(2), ValueError, "Tensor lr must be 1-element"),
        ("clip_norm", None, TypeError, "clip_norm must be a number, but got None"),
        ("betas", (0.9,), ValueError, "betas must be two numbers"),
        ("betas", (0.9, None), TypeError, r"betas\[1\] must be a number, but got None"),
    ],
    ids=["string", "vector", "no limit", "one beta", "no beta"],
)
def test_a_bad_number_is_refused_at_every_reading_and_a_mended_one_is_read(name, bad, error, text):
    values, groups = reader(), [group()]
    values.read(groups)
    first, good = values.version, groups[0].get(name, 0.0)
    groups[0][name] = bad
    for _ in range(2):
        with pytest.raises(error, match=text):
            values.read(groups)
    groups[0][name] = good
    groups[0]["foreach"] = True
    values.read(groups)
    assert values.version > first


def test_rates_that_are_set_back_after_an_interrupt_are_read():
    class Interrupting(dict):
        def __setitem__(self, key, value):
            raise KeyboardInterrupt

    values, groups = reader(), [group(), group()]
    values.read(groups)
    second = values.groups[1]
    values.groups[1] = Interrupting(second)
    for each in groups:
        each["lr"] = 0.7
    with pytest.raises(KeyboardInterrupt):
        values.read(groups)
    values.groups[1] = second
    for each in groups:
        each["lr"] = 0.1
    values.read(groups)
    assert [each["lr"] for each in values.groups] == [0.1, 0.1]
