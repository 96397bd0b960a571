import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dragon.vm.torch import nn
from dragon.vm.torch.optim import SGD, Adam, AdamW

from .judging import judged_step, make_params, params_of, place, same_bits, set_grads

PAIRS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        set_grads(params_of(optimizer), number)
        optimizer.step()


def copies(params: list[Any]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.01, "weight_decay": 0.1}]


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of parameters, states and groups."""
    saved = copy.deepcopy(optimizer.state_dict())
    return {"params": [param.detach().clone() for param in params_of(optimizer)], **saved}


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(
    pair=st.sampled_from(PAIRS),
    dtype=st.sampled_from(DTYPES),
    amsgrad=st.booleans(),
    n_steps=st.integers(0, 4),
    ours_first=st.booleans(),
    backend=st.sampled_from([None, "eager"]),
)
def test_a_run_goes_on_with_the_other_optimizer(
    pair: tuple[Any, Any], dtype: torch.dtype, amsgrad: bool, n_steps: int, ours_first: bool, backend: str | None
) -> None:
    ours, theirs = pair

    def make(which: Any, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        extra = {"epsilon_hat": False, "backend": backend} if which is ours else {}
        return which(groups_of(params), amsgrad=amsgrad, **extra)

    first, second = (ours, theirs) if ours_first else (theirs, ours)
    optimizer = make(first, make_params(dtype))
    run(optimizer, range(n_steps))
    other = make(second, copies(params_of(optimizer)))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same_bits(other.state_dict()["state"], optimizer.state_dict()["state"])
    for number in range(n_steps, n_steps + 2):
        set_grads(params_of(other), number)
        judged_step(other, compute_dtype=None if second is ours or dtype.is_complex else dtype)


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(
    dtype=st.sampled_from(DTYPES), amsgrad=st.booleans(), n_steps=st.integers(0, 3), how=st.sampled_from("dpsw")
)
def test_a_copied_pickled_or_saved_run_goes_on_bit_by_bit(
    dtype: torch.dtype, amsgrad: bool, n_steps: int, how: str
) -> None:
    optimizer = Adam(groups_of(make_params(dtype)), amsgrad=amsgrad, max_grad_norm=1.0, eps=1e-3)
    run(optimizer, range(n_steps))
    before = everything(optimizer)
    if how == "d":
        other = copy.deepcopy(optimizer)
    elif how == "p":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        other = Adam(groups_of(copies(params_of(optimizer))), max_grad_norm=1.0)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=how == "w"))
    assert same_bits(everything(other), before)
    run(other, range(n_steps, n_steps + 2))
    assert same_bits(everything(optimizer), before), "the copy shares memory with the original"
    run(optimizer, range(n_steps, n_steps + 2))
    assert same_bits(everything(other), everything(optimizer))


def test_the_kernel_goes_on_from_pytorchs_checkpoint_and_from_its_own(device: torch.device) -> None:
    theirs = torch.optim.Adam(groups_of(make_params(device=place("triton", device))))
    run(theirs, range(2))
    ours = Adam(groups_of(copies(params_of(theirs))), epsilon_hat=False, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    set_grads(params_of(ours), 2)
    judged_step(ours)
    again = Adam(groups_of(copies(params_of(ours))), epsilon_hat=False, backend="triton")
    again.load_state_dict(ours.state_dict())
    for optimizer in (ours, again):
        run(optimizer, range(3, 4))
    assert same_bits(everything(again), everything(ours))


@pytest.mark.parametrize(
    "steps", [lambda n: n, float, lambda n: torch.tensor([float(n)]), lambda n: torch.tensor(n)]
)
def test_an_old_dict_loads_and_what_it_does_not_say_stays(steps: Any) -> None:
    theirs = torch.optim.Adam(make_params())
    run(theirs, range(3))
    saved = theirs.state_dict()
    for group in saved["param_groups"]:
        for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            del group[name]
    for state in saved["state"].values():
        state["step"] = steps(3)
    ours = Adam(copies(params_of(theirs)), epsilon_hat=False, maximize=True)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["maximize"] is True
    # What means the same to PyTorch stands in no group.
    assert "epsilon_hat" not in ours.param_groups[0]
    for state in ours.state.values():
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        assert state["step"] == 3
    set_grads(params_of(ours), 3)
    judged_step(ours)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_put_there", [False, True])
def test_a_count_that_is_a_number_is_exact_under_any_default_dtype(
    default: torch.dtype, is_put_there: bool
) -> None:
    optimizer = Adam(make_params())
    run(optimizer, range(1))
    saved = optimizer.state_dict()
    torch.set_default_dtype(default)
    try:
        for state in saved["state"].values():
            state["step"] = 70001
        if is_put_there:
            for param, state in zip(params_of(optimizer), saved["state"].values(), strict=True):
                optimizer.state[param] = state
        else:
            optimizer.load_state_dict(saved)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {float(state["step"]) for state in optimizer.state.values()} == {70002.0}


@pytest.mark.parametrize("backend", ["triton", "native", "eager"])
def test_counters_are_right_under_a_wide_default_dtype(backend: str, device: torch.device) -> None:
    """PyTorch's are float64 then; kernels count in float32."""
    where = place(backend, device)
    torch.set_default_dtype(torch.float64)
    try:
        theirs = torch.optim.Adam(make_params(torch.float64, where), lr=0.1)
        ours = Adam(make_params(torch.float64, where), lr=0.1, backend=backend)
        for optimizer in (theirs, ours):
            run(optimizer, range(2))
        again = Adam(make_params(torch.float64, where), lr=0.1, backend=backend)
        again.load_state_dict(theirs.state_dict())
        for param, its in zip(params_of(again), params_of(theirs), strict=True):
            param.data.copy_(its.data)
        for param in params_of(ours):
            ours.state[param]["step"] = torch.tensor(2.0)
        for optimizer in (theirs, ours, again):
            run(optimizer, range(2, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    for optimizer in (ours, again):
        assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
        for mine, its in zip(params_of(optimizer), params_of(theirs), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


def test_wide_states_of_narrow_parameters_stay_wide() -> None:
    params = make_params(torch.bfloat16)
    wide = Adam(params, state_dtype=torch.float32)
    run(wide, range(2))
    narrow = Adam(copies(params))
    narrow.load_state_dict(wide.state_dict())
    assert same_bits(narrow.state_dict()["state"], wide.state_dict()["state"])
    for optimizer in (wide, narrow):
        run(optimizer, range(2, 4))
    assert same_bits(everything(narrow), everything(wide))


@pytest.mark.parametrize(
    ("saved", "param", "asked", "expected"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, None, torch.float32),
        (torch.float64, torch.float32, None, torch.float64),
        (torch.float64, torch.float32, torch.float32, torch.float32),
    ],
)
def test_loaded_states_take_the_asked_dtype_or_the_wider_one(
    saved: torch.dtype, param: torch.dtype, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    theirs = torch.optim.Adam(make_params(saved))
    run(theirs, range(1))
    ours = Adam(make_params(param), state_dtype=asked)
    ours.load_state_dict(theirs.state_dict())
    assert {state["exp_avg"].dtype for state in ours.state.values()} == {expected}
    run(ours, range(1, 2))


def test_nothing_shares_memory_with_a_loaded_dict() -> None:
    lr = torch.tensor(0.1)
    first = Adam(make_params(), lr=lr)
    run(first, range(1))
    saved = first.state_dict()
    second = Adam(make_params())
    second.load_state_dict(saved)
    before = copy.deepcopy(saved)
    run(second, range(1, 3))
    second.param_groups[0]["lr"].fill_(7.0)
    assert same_bits(saved, before)


@pytest.mark.parametrize(
    "damage", ["shape", "complex", "missing", "maximum", "step", "bad step", "bad steps", "groups", "length"]
)
def test_a_dict_that_does_not_fit_is_refused_before_anything_changes(damage: str) -> None:
    names = ["a", "b", "c", "d"]
    optimizer = Adam(list(zip(names, make_params(), strict=True)), amsgrad=True)
    run(optimizer, range(2))
    broken = copy.deepcopy(optimizer.state_dict())
    broken["param_groups"][0]["lr"] = 5.0
    state = broken["state"][3]
    text = r"parameter 3 \(d\)"
    if damage == "shape":
        state["exp_avg"] = state["exp_avg"].flatten()
    elif damage == "complex":
        state["exp_avg_sq"] = state["exp_avg_sq"] + 0j
    elif damage in ("bad step", "bad steps"):
        state["step"] = torch.ones(2) if damage == "bad steps" else torch.tensor(3j)
    elif damage == "groups":
        broken["param_groups"] *= 2
        text = "different number of parameter groups"
    elif damage == "length":
        broken["param_groups"][0]["params"].pop()
        text = "doesn't match the size"
    else:
        del state[{"missing": "exp_avg_sq", "maximum": "max_exp_avg_sq", "step": "step"}[damage]]
    before = everything(optimizer)
    entries = [entry for state in optimizer.state.values() for entry in state.values()]
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(broken)
    assert same_bits(everything(optimizer), before)
    after = [entry for state in optimizer.state.values() for entry in state.values()]
    assert all(map(lambda a, b: a is b, entries, after))
    run(optimizer, range(2, 3))


@pytest.mark.parametrize("through", ["none", "ours", "torch"])
def test_amsgrad_can_be_switched_on_in_the_middle_of_a_run(through: str) -> None:
    optimizer: torch.optim.Optimizer = Adam(make_params(), epsilon_hat=False)
    run(optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    if through != "none":
        make = Adam if through == "ours" else torch.optim.Adam
        other = make(copies(params_of(optimizer)))
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
    for number in range(2, 4):
        set_grads(params_of(optimizer), number)
        judged_step(optimizer)
    assert all("max_exp_avg_sq" in state for state in optimizer.state.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_settings_pending_sums_and_counts(how: str) -> None:
    optimizer = Adam(make_params(), backend="eager", max_grad_norm=0.5, skip_nonfinite=True)
    set_grads(params_of(optimizer), 0)
    params_of(optimizer)[0].grad.fill_(torch.inf)
    optimizer.step()
    set_grads(params_of(optimizer), 1)
    optimizer.sum_grad()
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert other.n_skipped_steps == 1
    for each in (optimizer, other):
        set_grads(params_of(each), 2)
        each.step()
    assert same_bits(everything(other), everything(optimizer))
    assert optimizer.state


def test_loading_keeps_what_a_dict_is_not_about() -> None:
    optimizer = Adam(make_params(), skip_nonfinite=True)
    saved = optimizer.state_dict()
    set_grads(params_of(optimizer), 0)
    params_of(optimizer)[0].grad.fill_(torch.nan)
    optimizer.step()
    set_grads(params_of(optimizer), 1)
    optimizer.sum_grad()
    optimizer.load_state_dict(saved)
    assert optimizer.n_skipped_steps == 1
    optimizer.step()
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 1, "the sum was lost"


def test_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    optimizer = Adam(make_params())
    run(optimizer, range(1))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert saved["extra"] == 1

    def rename(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("before loading")
        return {"state": given["renamed"], "param_groups": given["param_groups"]}

    def check(loaded: Any) -> None:
        seen.append("after loading")
        assert all(state["step"] == 1 for state in loaded.state.values())
        assert len(loaded.state) == 4

    other = Adam(make_params())
    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(check)
    other.load_state_dict({"renamed": saved["state"], "param_groups": saved["param_groups"]})
    assert seen == ["before saving", "before loading", "after loading"]
    assert same_bits(other.state_dict()["state"], saved["state"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_goes_on_from_pytorchs_checkpoint_and_back(momentum: float, dampening: float) -> None:
    theirs = torch.optim.SGD(make_params(torch.float64), lr=0.1, momentum=momentum, dampening=dampening)
    run(theirs, range(2))
    ours = SGD(copies(params_of(theirs)))
    ours.load_state_dict(theirs.state_dict())
    back = torch.optim.SGD(copies(params_of(theirs)))
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (theirs, ours, back):
        run(optimizer, range(2, 4))
    for expected, *found in zip(*map(params_of, (theirs, ours, back)), strict=True):
        for param in found:
            torch.testing.assert_close(param, expected, rtol=1e-14, atol=1e-14)


def test_adamw_stays_decoupled_whatever_it_loads() -> None:
    optimizer = AdamW(make_params())
    optimizer.load_state_dict(torch.optim.Adam(make_params()).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert issubclass(AdamW, Adam)


@pytest.mark.gpu
def test_step_counters_move_to_the_device_that_updates() -> None:
    theirs = torch.optim.Adam(make_params(device="cuda"), fused=False)
    run(theirs, range(2))
    saved = theirs.state_dict()
    assert saved["state"][0]["step"].device.type == "cpu"
    ours = Adam(copies(params_of(theirs)), epsilon_hat=False)
    ours.load_state_dict(saved)
    assert ours.state[params_of(ours)[0]]["step"].is_cuda
    back = torch.optim.Adam(copies(params_of(theirs)), fused=True)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (ours, back):
        set_grads(params_of(optimizer), 2)
        judged_step(optimizer)


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.9}, {"master_weights": "split16"}, {"state_dtype": "8bit"}], ids=str
)
def test_states_of_dragons_own_parameters_are_plain_tensors(options: dict[str, Any], is_dense: bool) -> None:
    """Who loads them may not know Dragon's tensors."""
    value = torch.randn(64, 128).to(torch.bfloat16)
    param = nn.Parameter(value[:, :64].contiguous() if is_dense else value[:, ::2])
    optimizer = Adam([param], **options)

    def types(state: dict[str, Any]) -> set[type]:
        return {type(entry) for entry in state.values() if isinstance(entry, torch.Tensor)}

    for _ in range(2):
        param.grad = torch.ones(64, 64).to(torch.bfloat16)
        optimizer.step()
        param.grad = torch.ones(64, 64).to(torch.bfloat16)
        optimizer.sum_grad()
        optimizer.param_groups[0]["amsgrad"] = True
        saved = optimizer.state_dict()["state"][0]
        assert types(saved) == types(optimizer.state[param]) == {torch.Tensor}
        optimizer.load_state_dict(optimizer.state_dict())
