import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import Adam as AdamImportedEarly

from dragon.vm.torch.optim import SGD, Adam, AdamW, Optimizer, swap

from .judging import judged_step, make_params, params_of, same_bits, set_grads


@pytest.fixture
def theirs() -> Iterator[Any]:
    """PyTorch's module; whatever a test swaps in it is undone."""
    yield torch.optim
    assert type(torch.optim.Adam(make_params())).__module__ == "torch.optim.adam", "a swap was left in force"


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        set_grads(params_of(optimizer), number)
        optimizer.step()


def test_whoever_asks_for_pytorchs_adam_gets_ours(theirs: Any) -> None:
    with swap():
        from torch.optim import AdamW as AdamWImportedNow
        from torch.optim.adam import Adam as AdamOfTheModule

        built = [
            make(make_params()) for make in (AdamImportedEarly, AdamOfTheModule, theirs.Adam, AdamWImportedNow)
        ]
    assert [isinstance(optimizer, Adam) for optimizer in built] == [True] * 4
    assert [isinstance(optimizer, AdamW) for optimizer in built] == [False, False, False, True]
    assert [type(optimizer).__name__ for optimizer in built] == ["Adam", "Adam", "Adam", "AdamW"]
    assert all(optimizer.param_groups[0]["epsilon_hat"] is False for optimizer in built)
    for optimizer in built:
        set_grads(params_of(optimizer), 0)
        judged_step(optimizer)


def test_type_checks_hold_in_both_directions(theirs: Any) -> None:
    before = theirs.AdamW(make_params())
    with swap():
        ours = theirs.AdamW(make_params())
        for optimizer in (before, ours):
            assert isinstance(optimizer, theirs.AdamW)
            assert isinstance(optimizer, theirs.Adam)
            assert isinstance(optimizer, theirs.Optimizer)
    assert isinstance(ours, theirs.AdamW)
    assert not isinstance(before, Optimizer)


def test_a_swap_can_be_plain_nested_and_undone_in_any_order(theirs: Any) -> None:
    first, second = swap(), swap()
    first.undo()
    assert isinstance(theirs.Adam(make_params()), Adam)
    second.undo()
    second.undo()
    assert not isinstance(theirs.Adam(make_params()), Adam)


def test_a_swap_ends_with_an_exception(theirs: Any) -> None:
    with pytest.raises(ZeroDivisionError), swap():
        _ = 1 / 0
    assert not isinstance(theirs.Adam(make_params()), Adam)


def test_derived_classes_copies_and_signatures_stay_pytorchs(theirs: Any) -> None:
    class Derived(theirs.Adam):
        pass

    signature = inspect.signature(theirs.Adam)
    original = theirs.Adam(make_params())
    with swap():
        assert type(Derived(make_params())) is Derived
        assert type(copy.deepcopy(original)) is theirs.Adam
        assert type(pickle.loads(pickle.dumps(original))) is theirs.Adam
        assert inspect.signature(theirs.Adam) == signature
        with pytest.raises(TypeError, match="params"):
            theirs.Adam()
        with pytest.raises(ValueError, match="Invalid learning rate: -1"):
            theirs.Adam(make_params(), lr=-1)
    assert type(theirs.Adam(params=make_params(), lr=0.1)) is theirs.Adam


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


@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_running_optimizer_is_taken_over(make: type[Adam], amsgrad: bool) -> None:
    original_class = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}[make]
    lr = torch.tensor(0.01)
    params = make_params()
    groups = [
        {"params": [("a", params[0])], "lr": lr},
        {"params": [("b", params[1]), ("c", params[2]), ("d", params[3])], "betas": (0.8, 0.95), "maximize": True},
    ]
    original = original_class(groups, weight_decay=0.1, amsgrad=amsgrad)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(original, 0.5)
    run(original, range(2))
    params[3].grad = None
    original.step()
    scheduler.step()
    saved = copy.deepcopy(original.state_dict())

    ours = make.from_torch(original, max_grad_norm=1e9)
    assert type(ours) is make
    assert params_of(ours) == params_of(original)
    assert same_bits(ours.state_dict()["state"], saved["state"])
    for new, old in zip(ours.state_dict()["param_groups"], saved["param_groups"], strict=True):
        assert same_bits({name: new[name] for name in old}, old)
        assert new["epsilon_hat"] is False
    assert ours.param_groups[0]["lr"] is lr
    set_grads(params, 3)
    judged_step(ours)
    assert same_bits(original.state_dict()["state"], saved["state"]), "the original's state was written"
    torch.optim.lr_scheduler.ExponentialLR(ours, 0.5, last_epoch=1)


def test_a_fresh_optimizer_is_taken_over_too() -> None:
    ours = Adam.from_torch(torch.optim.AdamW(make_params(), lr=0.5))
    assert (ours.defaults["lr"], ours.defaults["decoupled_weight_decay"], len(ours.state)) == (0.5, True, 0)


def test_sgd_is_taken_over() -> None:
    original = torch.optim.SGD(make_params(torch.float64), lr=0.1, momentum=0.9, dampening=0.1, nesterov=False)
    run(original, range(2))
    ours = SGD.from_torch(copy.deepcopy(original))
    for optimizer in (original, ours):
        run(optimizer, range(2, 4))
    for left, right in zip(params_of(original), params_of(ours), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)


def test_what_is_no_adam_or_not_decoupled_is_not_taken_over() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.optim\.Adam, but got torch\.optim\.\S+NAdam"):
        Adam.from_torch(torch.optim.NAdam(make_params()))
    with pytest.raises(ValueError, match="decoupled_weight_decay must be True for AdamW"):
        AdamW.from_torch(torch.optim.Adam(make_params()))
