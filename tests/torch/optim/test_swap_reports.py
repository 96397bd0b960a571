"""What a swap says of the optimizers that it has seen."""

import gc
import inspect
import pickle
import weakref
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam, swap
from dragon.vm.torch.optim._swap import LeftAlone

from .judging import make_params, params_of, run, same_bits


def test_what_was_built_is_recorded_and_survives_the_swap(theirs: Any) -> None:
    with swap() as swapped:
        optimizer = theirs.Adam(make_params(), fused=True)
        theirs.AdamW(make_params()[:1])
    run(optimizer, range(3))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(10))]})
    assert [(entry.name, entry.n_steps, entry.counts()) for entry in swapped.replaced] == [
        ("Adam", 3, (5, 15 + 7 + 1 + 24 + 10)),
        ("AdamW", 0, (1, 15)),
    ]
    other = pickle.loads(pickle.dumps(optimizer))
    run(other, range(3, 5))
    for param in params_of(optimizer):
        param.grad = None
    run(optimizer, range(3, 5))
    assert same_bits(other.state_dict(), optimizer.state_dict())


def test_ours_built_by_name_are_not_recorded(theirs: Any) -> None:
    class Mine(Adam):
        pass

    with swap() as swapped:
        Adam(make_params())
        Mine(make_params())
        SGD(make_params())
    assert swapped.report() == "no optimizer was replaced in this process"


def test_derived_classes_are_left_alone_and_named(theirs: Any) -> None:
    class Derived(theirs.AdamW):
        pass

    with swap() as swapped:
        assert type(Derived(make_params())) is Derived
        Derived(make_params())
    name = f"{__name__}.test_derived_classes_are_left_alone_and_named.<locals>.Derived"
    assert swapped.left_alone == [(name, "it is derived from torch.optim.AdamW")] * 2
    assert swapped.report().splitlines() == [
        "no optimizer was replaced in this process",
        f"  not replaced: {name} (2 times): it is derived from torch.optim.AdamW",
    ]


def test_optimizers_of_which_a_report_says_the_same_share_a_line(theirs: Any) -> None:
    with swap() as swapped:
        run(theirs.Adam(make_params()), range(2))
        for _ in range(1000):
            theirs.SGD(make_params())
        run(theirs.Adam(make_params()), range(2))
    assert swapped.report().splitlines() == [
        "1002 optimizers replaced",
        "  torch.optim.Adam (2 times): 47 parameters in 4 tensors, 2 steps",
        "  torch.optim.SGD (1000 times): 47 parameters in 4 tensors, 0 steps",
    ]


def test_a_report_keeps_no_optimizer_alive_and_counts_what_it_had(theirs: Any) -> None:
    with swap() as swapped:
        optimizer = theirs.Adam(make_params())
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert swapped.report().splitlines() == [
        "1 optimizer replaced",
        "  torch.optim.Adam: 47 parameters in 4 tensors, 0 steps",
    ]


def test_parameters_that_have_no_shape_yet_are_counted_once_they_have(theirs: Any) -> None:
    module = torch.nn.LazyLinear(3)
    with swap() as swapped:
        optimizer = theirs.Adam(module.parameters())
    assert [entry.counts() for entry in swapped.replaced] == [(2, 0)]
    module(torch.ones(2, 5))
    assert [entry.counts() for entry in swapped.replaced] == [(2, 18)]
    assert type(optimizer) is Adam


@pytest.mark.parametrize(("grows", "counts"), [(False, "18 parameters in 2"), (True, "22 parameters in 4")])
def test_a_report_knows_the_parameters_of_the_last_step_when_the_optimizer_is_gone(
    grows: bool, counts: str, theirs: Any
) -> None:
    def train() -> None:
        model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 1))
        optimizer = theirs.Adam(model[0].parameters())
        for number in range(2):
            model(torch.ones(2, 5)).sum().backward()
            optimizer.step()
            if number == 0 and grows:
                optimizer.add_param_group({"params": model[1].parameters()})

    with swap() as swapped:
        train()
    gc.collect()
    assert swapped.report().splitlines()[1] == f"  torch.optim.Adam: {counts} tensors, 2 steps"


def test_a_swap_knows_the_rank_that_its_process_has_when_an_optimizer_is_built(
    theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with swap() as swapped:
        assert swapped.rank == 1
        # A script gives its own to `init_process_group`.
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        for rank, kind in ((2, theirs.Adam), (3, type("Derived", (theirs.Adam,), {}))):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            kind(make_params())
            assert swapped.rank == rank


def test_the_documentation_of_a_report_tells_all_that_it_has() -> None:
    # The reference shows docstrings, and no comments.
    text = inspect.getdoc(LeftAlone) or ""
    assert all(f"{name}: " in text for name in LeftAlone._fields)
