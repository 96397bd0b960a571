"""Hyperparameters are read again when, and only when, something in them may have changed."""

import pytest
import torch

from dragon.vm.torch.optim._plan.hyperparameters import GroupNumbers

NAMES = ("lr", "betas", "maximize", "foreach")


def group(**changes):
    return {"params": [], "lr": 0.1, "betas": (0.9, 0.99), "maximize": False, "foreach": None, **changes}


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.update(lr=0.2),
        lambda g: g.update(lr=torch.tensor(0.2)),
        lambda g: g.update(betas=[0.9, 0.5]),
        lambda g: g.update(betas=(torch.tensor(0.9), torch.tensor(0.5))),
        lambda g: g.update(maximize=True),
        lambda g: g.update(foreach=False),
    ],
)
def test_what_changed_is_read(change):
    numbers, groups = GroupNumbers(), [group(), group()]
    first = numbers.read(groups, NAMES)
    assert first == [(0.1, (0.9, 0.99), False, None)] * 2
    change(groups[1])
    assert not numbers.are_unchanged(groups)
    second = numbers.read(groups, NAMES)
    assert second[0] == first[0]
    assert second[1] != first[1]
    assert numbers.read(groups, NAMES) == second


@pytest.mark.parametrize(
    ("value", "write"),
    [
        ({"betas": [0.9, 0.99]}, lambda g: g["betas"].__setitem__(1, 0.5)),
        ({"lr": torch.tensor(0.1)}, lambda g: g["lr"].fill_(0.5)),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99))}, lambda g: g["betas"][0].fill_(0.5)),
    ],
    ids=["list", "tensor", "tuple of tensors"],
)
def test_what_is_written_in_place_is_read(value, write):
    numbers, groups = GroupNumbers(), [group(), group(**value)]
    first = numbers.read(groups, NAMES)
    assert not numbers.are_unchanged(groups)
    write(groups[1])
    assert numbers.read(groups, NAMES) != first


def test_groups_that_stay_are_known_to():
    numbers, groups = GroupNumbers(), [group(params=[torch.zeros(1)]), group()]
    assert not numbers.are_unchanged(groups)
    values = numbers.read(groups, NAMES)
    assert numbers.values == values
    # Watched only once they have stayed.
    assert not numbers.are_unchanged(groups)
    assert numbers.read(groups, NAMES) == values
    for _ in range(2):
        assert numbers.are_unchanged(groups)
    for change in (
        lambda: groups.append(group()),
        groups.pop,
        groups.reverse,
        lambda: groups[0]["params"].append(torch.zeros(1)),
        lambda: groups[1].update(params=[torch.zeros(1)]),
        lambda: groups[1]["params"].clear(),
    ):
        change()
        assert not numbers.are_unchanged(groups)
        for _ in range(2):
            assert len(numbers.read(groups, NAMES)) == len(groups)
        assert numbers.are_unchanged(groups)


def test_a_bad_number_is_refused_at_every_reading():
    numbers, groups = GroupNumbers(), [group()]
    numbers.read(groups, NAMES)
    groups[0]["lr"] = "fast"
    for _ in range(2):
        with pytest.raises(TypeError, match="lr must be a number, but got 'fast'"):
            numbers.read(groups, NAMES)
    groups[0]["lr"] = 0.1
    assert numbers.read(groups, NAMES)


def test_what_was_refused_is_read_again():
    numbers, groups = GroupNumbers(), [group()]
    numbers.read(groups, NAMES)
    groups[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        numbers.read(groups, NAMES)
    groups[0]["lr"] = 0.1
    assert not numbers.are_unchanged(groups)
