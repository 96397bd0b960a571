import copy
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam, AdamW

from .judging import judged_step, make_params, params_of, run, same_bits, set_grads


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
    assert [group.get("epsilon_hat", False) for group in ours.param_groups] == [False, False]
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


@pytest.mark.parametrize(
    "option",
    [
        *({"lr": 0.5}, {"betas": (0.5, 0.6)}, {"eps": 1e-3}, {"weight_decay": 0.5}, {"amsgrad": True}),
        *({"maximize": True}, {"capturable": True}, {"differentiable": True}, {"fused": True}, {"foreach": True}),
    ],
    ids=str,
)
def test_an_option_takes_the_place_of_what_all_groups_have(option: dict[str, Any]) -> None:
    params = make_params()
    original = torch.optim.AdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}])
    run(original, range(2))
    ours = AdamW.from_torch(original, **option)
    ((name, value),) = option.items()
    assert [group[name] for group in ours.param_groups] == [value, value]
    assert [group[name] for group in original.param_groups] != [value, value], "the original was written"
    assert ours._handles_scaling is (name == "fused")
    if name == "differentiable":
        return
    # As if it had been set in the groups.
    mirror = AdamW.from_torch(original)
    for group in mirror.param_groups:
        group[name] = value
    mirror = copy.deepcopy(mirror)
    for optimizer in (ours, mirror):
        run(optimizer, range(2, 4))
    for left, right in zip(params_of(ours), params_of(mirror), strict=True):
        assert same_bits(left.detach(), right.detach())


def test_entries_of_others_are_taken_over_as_copies() -> None:
    original = torch.optim.Adam(make_params())
    run(original, range(2))
    original.state["tracker"] = {"losses": [1.0]}  # type: ignore[index]  # some libraries do so
    ours = Adam.from_torch(original)
    assert ours.state_dict()["state"]["tracker"] == {"losses": [1.0]}
    original.state["tracker"]["losses"].append(2.0)  # type: ignore[index]  # see above
    assert ours.state["tracker"] == {"losses": [1.0]}


def test_sums_that_no_step_has_used_are_not_lost() -> None:
    params = make_params()
    original = AdamW(params)
    set_grads(params, 0)
    original.sum_grad()
    with pytest.raises(RuntimeError, match=r"step\(\) first, or make a new optimizer"):
        AdamW.from_torch(original)
    other = AdamW(params)
    other.load_state_dict(original.state_dict())
    assert len(original._sums.totals) == len(params)
    assert same_bits(list(other._sums.totals.values()), list(original._sums.totals.values()))
    # A scaler that asks finds them in `.grad`.
    assert original._step_supports_amp_scaling
    assert not original._sums
    with pytest.raises(RuntimeError, match=r"step\(\) first, or make a new optimizer"):
        AdamW.from_torch(original)
    original.step()
    AdamW.from_torch(original)


def test_an_option_of_the_original_can_be_taken_back() -> None:
    ours = Adam.from_torch(torch.optim.Adam(make_params(), fused=True), fused=False, foreach=True)
    assert (ours.param_groups[0]["fused"], ours._handles_scaling) == (False, False)
    assert (
        SGD.from_torch(torch.optim.SGD(make_params(), momentum=0.5), momentum=0.9).param_groups[0]["momentum"]
        == 0.9
    )


@pytest.mark.parametrize("is_ours", [False, True])
def test_narrow_moments_remember_the_betas_that_they_were_made_with(is_ours: bool) -> None:
    original = torch.optim.AdamW(make_params(), betas=(0.9, 0.9))
    if is_ours:
        original = AdamW.from_torch(original, betas=(0.2, 0.9), state_dtype=torch.bfloat16)
        run(original, range(2))
        original.param_groups[0]["betas"] = (0.9, 0.9)
    set_grads(params_of(original)[:-1], 2)
    original.step()
    ours = AdamW.from_torch(original, betas=(0.5, 0.9), state_dtype=torch.bfloat16)
    mirror = AdamW.from_torch(original, state_dtype=torch.bfloat16)
    mirror.param_groups[0]["betas"] = (0.5, 0.9)
    set_grads(params_of(mirror), 3)
    mirror.step()
    assert ours.param_groups[0]["bound_betas"] == mirror.param_groups[0]["bound_betas"]


def test_other_moments_remember_no_betas() -> None:
    original = torch.optim.AdamW(make_params(), betas=(0.9, 0.9))
    fresh = AdamW.from_torch(original, betas=(0.5, 0.999), state_dtype=torch.bfloat16)
    assert "bound_betas" not in fresh.param_groups[0]
    run(original, range(2))
    wide = AdamW.from_torch(original, betas=(0.5, 0.999))
    assert "bound_betas" not in wide.state_dict()["param_groups"][0]
    assert wide.param_groups[0]["params"] is not original.param_groups[0]["params"]


def test_an_amsgrad_that_was_switched_on_since_the_last_step_is_taken_over() -> None:
    original = Adam(make_params())
    run(original, range(2))
    original.param_groups[0]["amsgrad"] = True
    ours = Adam.from_torch(copy.deepcopy(original))
    for optimizer in (original, ours):
        run(optimizer, range(2, 4))
    assert same_bits(ours.state_dict()["state"], original.state_dict()["state"])


def test_a_scheduler_of_the_new_optimizer_begins_with_the_rate_that_was_asked_for():
    param = torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.Adam([param], lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.5)
    ours = Adam.from_torch(theirs, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5)
    assert ours.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("asked", [{}, {"epsilon_hat": False}])
def test_the_epsilon_of_an_optimizer_of_this_library_is_taken_over(asked: dict[str, Any]) -> None:
    original = Adam(make_params(), epsilon_hat=True)
    ours = Adam.from_torch(original, **asked)
    assert ours.param_groups[0].get("epsilon_hat", False) is (not asked)


@pytest.mark.parametrize("releases", [True, False])
@pytest.mark.parametrize("takes_over", [False, True])
def test_the_latest_optimizer_of_a_parameter_decides_about_its_gradient(takes_over: bool, releases: bool) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizers = [Adam([param], lr=0.25, release_gradients=True)]
    options = {"lr": 1.0, "release_gradients": releases}
    optimizers.append(Adam.from_torch(optimizers[0], **options) if takes_over else Adam([param], **options))
    for expected, is_released in ((-1.0, releases), (-1.25, True)):
        param.sum().backward()
        assert (param.grad is None) is is_released
        optimizers[-1].step()
        assert param.tolist() == pytest.approx([expected] * 3)
        optimizers.pop().zero_grad()
    # Nothing of an optimizer that is gone keeps PyTorch from this.
    torch.utils.swap_tensors(param, torch.nn.Parameter(torch.ones(3)))


def released(param: torch.nn.Parameter) -> bool:
    """Whether a backward pass leaves no gradient."""
    param.sum().backward()
    is_released, param.grad = param.grad is None, None
    return is_released


@pytest.mark.parametrize("gone", [0, 1])
def test_one_that_keeps_gradients_keeps_them_whatever_other_optimizer_goes(gone: int) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    releasing = [Adam([param], release_gradients=True) for _ in range(2)]
    keeping = Adam([param])
    del releasing[gone]
    assert not released(param)
    del keeping
    assert released(param)


def test_the_latest_but_one_decides_once_the_latest_is_gone() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizers = [SGD([param], lr=lr, release_gradients=True) for lr in (4.0, 2.0, 1.0)]
    del optimizers[-1]
    assert released(param)
    assert param.tolist() == [-2.0] * 3


def test_a_new_group_takes_no_gradients_of_others_from_a_later_optimizer() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    keeping = SGD(params[:1], lr=1.0)
    releasing = SGD(params[:1], lr=1.0, release_gradients=True)
    keeping.add_param_group({"params": params[1:]})
    assert released(params[0])
    del releasing
    assert not released(params[0])


def test_a_new_group_does_not_make_an_optimizer_the_latest() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    earlier, _later = (SGD(params[:1], lr=lr, release_gradients=True) for lr in (1.0, 2.0))
    earlier.add_param_group({"params": params[1:]})
    assert released(params[0])
    assert params[0].tolist() == [-2.0] * 3


def test_an_optimizer_does_not_decide_about_parameters_that_have_left_it() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    earlier = SGD(params[:1], lr=1.0, release_gradients=True)
    later = SGD(params, lr=1.0, release_gradients=True)
    later.param_groups[0]["params"] = params[2:]
    # It looks for them in a backward pass.
    assert released(params[2])
    assert released(params[0])
    earlier.step()
    assert not released(params[1])
    torch.utils.swap_tensors(params[1], torch.nn.Parameter(torch.ones(3)))


def test_an_optimizer_without_release_keeps_no_reference_to_its_parameters() -> None:
    params = [torch.nn.Parameter(torch.full((3,), value)) for value in (0.0, 1.0)]
    optimizer = SGD(params[:1])
    torch.utils.swap_tensors(*params)
    assert optimizer.param_groups[0]["params"][0].tolist() == [1.0] * 3
