"""What a resumed run has of what a program changed, and what hooks see of it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._formats.bound import moment_bound

from .support import home


@pytest.mark.parametrize(
    ("name", "off"), [("clip_value", 0), ("clip_norm", 0), ("grad_scale", 1), ("ema_decay", 0)]
)
@pytest.mark.parametrize("of_group", [False, True])
def test_an_option_that_was_switched_off_stays_off(name: str, off: float, of_group: bool) -> None:
    def make() -> tuple[torch.nn.Parameter, SGD]:
        param = torch.nn.Parameter(torch.zeros(3))
        options = {name: 0.1}
        return param, SGD([{"params": [param], **options}], lr=1.0) if of_group else SGD(
            [param], lr=1.0, **options
        )

    _, optimizer = make()
    optimizer.param_groups[0][name] = off
    for _ in range(2):
        # A second resumption of what was resumed.
        param, resumed = make()
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        param.grad = torch.ones(3)
        resumed.step()
        assert param.tolist() == [-1, -1, -1]
        optimizer = resumed


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"flatten": True}], ids=str)
def test_hooks_see_what_is_saved(options: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(3))]
    optimizer = Adam(params, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    seen: list[set[str]] = []

    def by_name(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        seen.extend(set(entries) for entries in saved["state"].values())
        return {"wrapped": {f"p{key}": entries for key, entries in saved["state"].items()}}

    optimizer.register_state_dict_post_hook(by_name)
    saved = optimizer.state_dict()
    assert seen == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    assert saved["wrapped"].keys() == {"p0", "p1"}
    assert all(entries.keys() == {"step", "exp_avg", "exp_avg_sq"} for entries in saved["wrapped"].values())
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


@pytest.mark.parametrize("is_resumed", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_momentum_that_was_switched_on_beside_an_average_begins_as_pytorchs(
    decay: float, is_resumed: bool
) -> None:
    found = []
    for options in ({}, {"ema_decay": decay}):
        make: Any = SGD if options else torch.optim.SGD
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = make([param], lr=0.1, dampening=0.5, **options)
        for step in range(4):
            if step == 1:
                optimizer.param_groups[0]["momentum"] = 0.9
                if is_resumed:
                    # Between the switch and the step: what was saved then has no buffer.
                    saved, optimizer = optimizer.state_dict(), make([param], lr=0.1, dampening=0.5, **options)
                    optimizer.load_state_dict(saved)
            param.grad = torch.ones(3)
            optimizer.step()
        found.append(param.tolist())
    assert found[1] == pytest.approx(found[0])


@pytest.mark.parametrize("backend", ["triton", "native", "eager"])
def test_momentum_that_a_skipped_first_step_left_begins_as_pytorchs(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, device=home(backend)))
    optimizer = SGD([param], lr=1.0, momentum=0.5, dampening=0.5, skip_nonfinite=True, backend=backend)
    param.grad = torch.full_like(param, math.inf)
    optimizer.step()
    theirs = torch.nn.Parameter(torch.ones(3))
    other = torch.optim.SGD([theirs])
    # PyTorch's would share the buffer.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((optimizer, param), (other, theirs)):
        its.grad = torch.ones_like(its)
        each.step()
        assert its.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"ema_decay": 0.9}], ids=str)
def test_states_that_inference_mode_loaded_can_be_written(options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adam([param], **options)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        with torch.inference_mode():
            optimizer.load_state_dict(optimizer.state_dict())
    assert float(optimizer.state[param]["step"]) == 2


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}], ids=str)
def test_a_maximum_that_was_saved_first_in_inference_mode_can_be_written(options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adam([param], backend="eager", **options)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.param_groups[0]["amsgrad"] = True
        with torch.inference_mode():
            optimizer.state_dict()
    assert optimizer.state[param]["max_exp_avg_sq"].any()


def test_hooks_may_save_too() -> None:
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adam([param], state_dtype="8bit")
    param.grad = torch.ones_like(param)
    optimizer.step()
    inner: list[dict[str, Any]] = []

    def save(chosen: Any, saved: dict[str, Any]) -> None:
        if not inner:
            inner.append({})
            inner[0] = chosen.state_dict()

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_state_dict_post_hook(lambda chosen, saved: None)
    saved = optimizer.state_dict()
    assert inner[0]["state"][0].keys() == saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    "name", ["clip_value", "clip_norm", "ema_decay", "grad_scale", "epsilon_hat", "state_dtype"]
)
def test_a_group_that_is_switched_off_stays_so_when_it_is_built_anew(name: str) -> None:
    on, off = {
        "clip_value": (0.5, 0.0), "clip_norm": (0.5, 0.0), "ema_decay": (0.5, 0.0), "grad_scale": (2.0, 1.0),
        "epsilon_hat": (True, False), "state_dtype": ("8bit", None),
    }[name]  # fmt: skip
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:], name: off}], **{name: on})
    for built in (optimizer, type(optimizer)(optimizer.param_groups, **optimizer.defaults)):
        assert [group.get(name, "missing") for group in built.param_groups] == [on, off]


def test_a_bound_is_that_of_the_betas_which_the_moments_were_made_with() -> None:
    found = []
    for is_resumed in (False, True):
        param = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = Adam([param], lr=0.1, state_dtype="8bit")
        for step in range(6):
            if step == 3:
                if is_resumed:
                    saved, optimizer = optimizer.state_dict(), Adam([param], lr=0.1, state_dtype="8bit")
                    optimizer.load_state_dict(saved)
                optimizer.param_groups[0]["betas"] = (0.1, 0.2)
            param.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found.append(param)
    assert torch.equal(*found)


@pytest.mark.parametrize("is_idle", [False, True])
def test_betas_that_changed_before_the_first_moment_bound_nothing(is_idle: bool) -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Adam([param], betas=(0.95, 0.9), state_dtype="8bit")
    if is_idle:
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    param.grad = torch.ones(64, 64)
    optimizer.step()
    assert optimizer.param_groups[0]["bound_betas"] == (0.5, 0.5)


def test_what_others_keep_in_a_loaded_state_is_a_copy() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = Adam([param])
    theirs = {"tensor": torch.ones(2), "list": [1]}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: theirs}})
    optimizer.state[param]["tensor"].fill_(7.0)
    optimizer.state[param]["list"].append(7)
    assert (theirs["tensor"].tolist(), theirs["list"]) == ([1, 1], [1])


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), (1.5, 0.9)])
def test_betas_that_no_step_takes_are_loaded_as_pytorchs_are(betas: tuple[float, ...]) -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Adam([param], state_dtype="8bit")
    param.grad = torch.ones(64, 64)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = betas
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"betas must be two|Invalid beta parameter at index"):
        optimizer.step()
    assert "bound_betas" not in optimizer.param_groups[0]


@pytest.mark.parametrize("gives_sums", [False, True])
def test_a_group_without_moments_saves_the_bound_of_moments_elsewhere(gives_sums: bool) -> None:
    """Other processes may hold its parameters, and one of all saves the groups."""
    params = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
    idle, busy = ({"params": [param]} for param in params)
    optimizer = Adam([idle, busy], betas=(0.95, 0.9), state_dtype="8bit")
    for betas in ((0.95, 0.9), (0.5, 0.5)):
        for group in optimizer.param_groups:
            group["betas"] = betas
        params[1].grad = torch.ones(64, 64)
        optimizer.step()
    bounds = [group["bound_betas"] for group in optimizer.state_dict()["param_groups"]]
    assert bounds[0] == bounds[1] == (0.5, 0.5, math.inf)
    # Its first moment is bounded by the betas of now.
    params[0].grad = torch.ones(64, 64)
    if gives_sums:
        optimizer.sum_grad()
    optimizer.step()
    assert [group["bound_betas"] for group in optimizer.param_groups] == [(0.5, 0.5), bounds[1]]


@pytest.mark.parametrize("is_native", [False, True])
def test_groups_that_go_after_loading_leave_the_random_bits_of_others(is_native: bool) -> None:
    options = {"lr": 0.1, "state_dtype": torch.bfloat16, "native_state_dict": is_native}
    found = []
    for is_resumed in (False, True):
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(2)]
        optimizer = Adam([{"params": [param]} for param in params], **options)
        for step in range(3):
            if step == 2:
                if is_resumed:
                    saved, optimizer = optimizer.state_dict(), Adam(optimizer.param_groups, **options)
                    optimizer.load_state_dict(saved)
                del optimizer.param_groups[0]
            for param in params:
                param.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found.append(optimizer.state[params[1]]["exp_avg_sq"])
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")
def test_a_flat_dict_without_random_words_is_loaded_where_they_are_wanted() -> None:
    """PyTorch's loader gives an empty dict for what the file does not have."""
    found = []
    for is_rounded in (False, True):
        model = torch.nn.Linear(64, 64)
        optimizer = Adam(
            model.parameters(), state_dtype=torch.bfloat16, stochastic_rounding=is_rounded, native_state_dict=True
        )
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        found.append((model, optimizer))
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(*found[0], options=flat)
    set_optimizer_state_dict(*found[1], saved, options=flat)
    assert [state["stream"] for state in found[1][1].state.values()] == [0, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_before_the_first_step_has_no_bound(copied: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Adam([param], lr=0.1, state_dtype="8bit")
    optimizer.load_state_dict(optimizer.state_dict())
    other = copied(optimizer)
    assert all("bound_betas" not in chosen.param_groups[0] for chosen in (optimizer, other))
    assert (copied is copy.copy) == (other.state is optimizer.state)


def test_a_takeover_keeps_the_bound_of_the_betas_that_it_found() -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64))
    theirs = torch.optim.Adam([param], betas=(0.5, 0.9))
    param.grad = torch.ones(64, 64)
    theirs.step()
    optimizer = Adam.from_torch(theirs, state_dtype="8bit")
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    optimizer.step()
    assert optimizer.param_groups[0]["bound_betas"] == (0.1, 0.2, moment_bound(0.5, 0.9, math.inf))


def test_sums_of_a_step_that_failed_are_saved() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(param.sum()).backward()
    optimizer.sum_grad()
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scaler.step(optimizer)
    for saved in (optimizer.state_dict(), copy.deepcopy(optimizer).state_dict()):
        assert saved["state"][0]["grad_sum"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("betas", [(0.8, 0.99), (0.5, 0.9)], ids=["constant", "changed"])
def test_full_dicts_of_pytorchs_checkpoint_functions_keep_the_bound(
    is_native: bool, betas: tuple[float, float]
) -> None:
    options = StateDictOptions(full_state_dict=True)

    def make() -> tuple[torch.nn.Module, Adam]:
        model = torch.nn.Linear(64, 64)
        return model, Adam(model.parameters(), betas=(0.8, 0.99), state_dtype="8bit", native_state_dict=is_native)

    model, optimizer = make()
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["betas"] = betas
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed_model, resumed = make()
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    optimizer.load_state_dict(optimizer.state_dict())
    found, expected = (each.param_groups[0]["bound_betas"] for each in (resumed, optimizer))
    assert (*found, 0.0)[:3] == (*expected, 0.0)[:3]
    assert len(expected) == (2 if betas == (0.8, 0.99) else 3)


def test_a_full_dict_without_a_bound_leaves_none() -> None:
    options = StateDictOptions(full_state_dict=True)
    model = torch.nn.Linear(2, 2)
    theirs, ours = torch.optim.Adam(model.parameters()), Adam(model.parameters())
    saved = get_optimizer_state_dict(model, theirs, options=options)
    set_optimizer_state_dict(model, ours, saved, options=options)
    assert "bound_betas" not in ours.param_groups[0]


@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.9}, {"clip_value": 1.0, "grad_scale": 0.5}, {"epsilon_hat": True}], ids=str
)
@pytest.mark.parametrize("is_native", [False, True])
def test_a_full_dict_gives_an_option_to_an_optimizer_without_it(is_native: bool, options: dict[str, Any]) -> None:
    full = StateDictOptions(full_state_dict=True)
    models = [torch.nn.Linear(64, 64) for _ in range(2)]
    ours, other = (Adam(model.parameters(), native_state_dict=is_native, state_dtype="8bit") for model in models)
    models[0](torch.ones(64)).sum().backward()
    ours.step()
    ours.param_groups[0].update(options)
    ours.step()
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], ours, options=full))
    set_optimizer_state_dict(models[1], other, saved, options=full)
    assert other.param_groups[0].items() >= options.items()
    assert other.param_groups[0].keys() <= ours.param_groups[0].keys()
    assert ("ema" in other.state[models[1].weight]) == ("ema_decay" in options)
    assert other.state[models[1].weight].keys() == ours.state[models[0].weight].keys()
    codes = [each.state[model.weight]["exp_avg_q8"] for each, model in zip((ours, other), models, strict=True)]
    assert torch.equal(*codes)
    # What the file lacks stays as it is.
    other.param_groups[0]["clip_norm"] = 0.25
    set_optimizer_state_dict(models[1], other, saved, options=full)
    assert other.param_groups[0]["clip_norm"] == 0.25


@pytest.mark.parametrize("is_native", [False, True])
def test_a_loaded_state_without_random_words_takes_none_that_another_one_has(is_native: bool) -> None:
    params = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    groups = [{"params": [param], "state_dtype": "8bit"} for param in params[:2]]
    optimizer = Adam(groups, native_state_dict=is_native)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    # The second parameter keeps its number, and stands before one that has none.
    del optimizer.state[params[0]]
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": params[2:]})
    optimizer.step()
    other = Adam([{"params": [param]} for param in params[1:]], state_dtype="8bit", native_state_dict=is_native)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert other.state[params[1]]["stream"] == 1
    assert other.state[params[2]]["stream"] != 1
