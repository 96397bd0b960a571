"""What is kept and told: state dicts, formats, bytes, errors, warnings."""

import copy
import math
import warnings
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch

from dragon.vm.memory import rows
from dragon.vm.torch.optim import SGD, Adam, AdamW, swap
from dragon.vm.torch.optim._backends.host import PIECE
from dragon.vm.torch.optim._formats.bound import moment_bound

from ..support import home
from .modes import BF16, FP32, MODES, SHAPES, bits, give_gradients, make, train

pytestmark = pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")


@pytest.mark.parametrize("mode", MODES)
def test_pytorchs_adam_goes_on_from_the_default_form(mode: str) -> None:
    params, optimizer = make(mode)
    train(params, optimizer, 2)
    saved = optimizer.state_dict()
    assert not any(name in group for group in saved["param_groups"] for name in ("state_dtype", "master_weights"))
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = torch.optim.AdamW(theirs)
    other.load_state_dict(copy.deepcopy(saved))
    give_gradients(theirs, 2)
    other.step()
    mine = saved["state"][0]["exp_avg"].to(theirs[0].dtype)
    assert mine.any()
    torch.testing.assert_close(other.state[theirs[0]]["exp_avg"], torch.lerp(mine, theirs[0].grad, 0.1))
    # And back again.
    optimizer.load_state_dict(other.state_dict())
    train(params, optimizer, 1)


def test_pytorchs_adam_refuses_the_native_form() -> None:
    params, optimizer = make("split8, 8bit", native_state_dict=True)
    train(params, optimizer, 1)
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg_q8"].dtype == torch.int8
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = torch.optim.AdamW(theirs)
    other.load_state_dict(saved)
    give_gradients(theirs, 2)
    with pytest.raises(KeyError, match="exp_avg"):
        other.step()


def test_the_native_form_has_what_process_groups_can_send() -> None:
    params, optimizer = make("split16", native_state_dict=True)
    train(params, optimizer, 2)
    saved, kept = optimizer.state_dict()["state"][0], optimizer.state[params[0]]
    assert saved["param_remainder"].dtype == BF16
    assert torch.equal(saved["param_remainder"].view(torch.int16), kept["param_remainder"])
    assert {type(value) for value in saved.values()} == {torch.Tensor, int}


def test_an_unknown_native_form_is_refused() -> None:
    params, optimizer = make("8bit", native_state_dict=True)
    train(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["storage"] = 2
    with pytest.raises(ValueError, match=r"storage for parameter 1: expected 1, .* got 2"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("key", ["param_remainder", "param_master", "master_param"])
def test_misshapen_masters_are_refused(key: str) -> None:
    master = FP32 if key == "param_master" else "split16"
    params, optimizer = make("split16", master_weights=master, native_state_dict=key != "master_param")
    train(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][key] = saved["state"][1][key][:1]
    with pytest.raises(ValueError, match=rf"{key} of shape \(1, 192\) .* for parameter 1"):
        optimizer.load_state_dict(saved)


def test_misshapen_scales_are_refused() -> None:
    params, optimizer = make("8bit", native_state_dict=True)
    train(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_scale"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg_scale of shape \(3,\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("source", MODES)
@pytest.mark.parametrize("target", ["8bit", "bf16 states", "split8, 8bit"])
def test_every_mode_loads_every_other(source: str, target: str) -> None:
    for native in (False, True):
        params, optimizer = make(source, native_state_dict=native)
        train(params, optimizer, 2)
        theirs, other = make(target)
        other.load_state_dict(optimizer.state_dict())
        train(theirs, other, 1, 2)
        assert float(other.state[theirs[0]]["step"]) == 3
        assert other.state_formats()["0"]["exp_avg_sq"] == make(target)[1].state_formats()["0"]["exp_avg_sq"]


def test_another_default_dtype_changes_nothing() -> None:
    ours = make("split8, 8bit")
    torch.set_default_dtype(BF16)
    try:
        theirs = make("split8, 8bit")
        for params, optimizer in (ours, theirs):
            for step in range(3):
                for param in params:
                    param.grad = torch.full_like(param, 0.1 * (step + 1))
                optimizer.step()
        with torch.no_grad():
            theirs[0][0].copy_(ours[0][0]), theirs[0][1].copy_(ours[0][1]), theirs[0][2].copy_(ours[0][2])
        dtypes = [
            {name: value.dtype for name, value in optimizer.state[params[0]].items() if torch.is_tensor(value)}
            for params, optimizer in (ours, theirs)
        ]
    finally:
        torch.set_default_dtype(FP32)
    assert dtypes[0] == dtypes[1]
    assert dtypes[0]["step"] == dtypes[0]["exp_avg_scale"] == FP32


def test_small_and_odd_tensors_keep_fp32_and_it_is_told() -> None:
    shapes = ((64, 64), (64, 63), (63, 64), (4096,), (64, 65), (128, 32))
    params, optimizer = make("8bit", shapes)
    found = {name: formats["exp_avg"] for name, formats in optimizer.state_formats().items()}
    assert [found[str(i)] for i in range(6)] == ["q8_signed", *["float32"] * 5]
    named = AdamW(torch.nn.Linear(64, 64).named_parameters(), state_dtype="8bit")
    assert named.state_formats() == {
        "weight": {"param": "float32", "exp_avg": "q8_signed", "exp_avg_sq": "q8_square_stochastic"},
        "bias": {"param": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"},
    }
    train(params, optimizer, 1)


@pytest.mark.parametrize("value", [torch.randn(64, 128).t(), torch.randn(1, 8192)[:, ::2]], ids=["turned", "gaps"])
@pytest.mark.parametrize(("asked", "square"), [("8bit", FP32), ({"exp_avg": "8bit", "exp_avg_sq": BF16}, BF16)])
def test_a_matrix_without_rows_of_blocks_keeps_fp32(value: torch.Tensor, asked: Any, square: torch.dtype) -> None:
    param = torch.nn.Parameter(value)
    optimizer = AdamW([param], state_dtype=asked)
    param.grad = torch.randn(param.shape)
    optimizer.step()
    state = optimizer.state[param]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (FP32, square)


@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize("backend", [None, "eager", "triton"])
def test_states_of_complex_parameters_have_their_dtype(make: Any, backend: str | None) -> None:
    found = []
    for asked in (None, BF16):
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128, device=home(backend or "native")))
        optimizer = make([param], lr=0.1, ema_decay=0.5, state_dtype=asked, backend=backend)
        for _ in range(2):
            param.grad = torch.ones_like(param) * 1j
            optimizer.step()
        formats = optimizer.state_formats()["0"]
        found.append([formats, *bits([param], optimizer)])
        assert set(formats.values()) == {"complex128"}
        assert optimizer.state[param]["ema"].dtype == torch.complex128
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_those_that_are_allocated(mode: str) -> None:
    params, optimizer = make(mode)
    train(params, optimizer, 1)
    told = optimizer.memory()
    kept = [value for param in params for value in optimizer.state[param].values() if torch.is_tensor(value)]
    grads = [param.grad for param in params]
    assert sum(told.values()) == sum(t.untyped_storage().nbytes() for t in (*params, *grads, *kept))
    assert told["parameters"] == sum(param.nbytes for param in params)
    assert (told["masters"] > 0) == (optimizer.param_groups[0].get("master_weights") is not None)
    for kind, key in (("averages", "ema"), ("counters", "step")):
        assert told[kind] == sum(state[key].nbytes for state in optimizer.state.values() if key in state)
    # Sums are fp32 at least, and take the place of gradients.
    optimizer.sum_grad()
    summed = {"sums": sum(4 * grad.numel() for grad in grads), "gradients": 0}
    assert optimizer.memory() == told | summed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("native", [False, True])
def test_loading_leaves_no_more_bytes_than_there_were(mode: str, native: bool) -> None:
    params, optimizer = make(mode, native_state_dict=native)
    train(params, optimizer, 1)
    told, names = optimizer.memory(), set(optimizer.state[params[0]])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.memory() == told
    assert set(optimizer.state[params[0]]) | {"stream"} == names | {"stream"}


@pytest.mark.parametrize("mode", ["8bit", "split8, 8bit", "split16, bf16 states"])
@pytest.mark.parametrize("native", [False, True])
def test_states_are_saved_and_loaded_one_parameter_at_a_time(mode: str, native: bool) -> None:
    params, optimizer = make(mode, ((64, 64),) * 20, native_state_dict=native)
    train(params, optimizer, 1)
    saved: dict[str, Any] = {}
    scratch = 32 * params[0].numel()
    held = held_during(lambda: saved.update(optimizer.state_dict()))
    assert max(held, default=0) <= (held[-1] if held else 0) + scratch
    told = optimizer.memory()
    held = held_during(lambda: optimizer.load_state_dict(saved))
    # There is no second dict in fp32: only what is kept from then on, beside what it takes the place of.
    assert max(held) <= told["states"] + told["masters"] + scratch


def test_bytes_of_a_large_model_are_those_of_the_table() -> None:
    shapes = [
        (50257, 768),
        (1024, 768),
        *[(2304, 768), (768, 768), (3072, 768), (768, 3072), (768,), (3072,)] * 12,
    ]
    params = [torch.empty(shape, device="meta") for shape in shapes]
    numel = sum(param.numel() for param in params)
    expected = (12, 8, 6.125, 14, 12, 8, 7, 5.125, 10, 6, 4.125)
    assert [row.kept / numel for row in rows(params)] == [pytest.approx(value, rel=0.01) for value in expected]


@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        (FP32, {"master_weights": "split16"}, "master_weights='split16': expected bfloat16 parameters"),
        (FP32, {"master_weights": FP32}, "master_weights=torch.float32: expected bfloat16 or float16 parameters"),
        (torch.float16, {"stochastic_rounding": True}, "stochastic_rounding=True: expected"),
        (torch.float64, {"state_dtype": "8bit"}, 'state_dtype="8bit": expected real parameters'),
        (torch.complex64, {"state_dtype": "8bit"}, 'state_dtype="8bit": expected real parameters'),
        (FP32, {"state_dtype": "8bit", "differentiable": True}, "differentiable=True"),
        (FP32, {"state_dtype": "4bit"}, "state_dtype: expected .* got '4bit'"),
        (FP32, {"state_dtype": torch.float16}, "float16 loses second moments"),
        (BF16, {"master_weights": "split16", "stochastic_rounding": True}, "an fp32 master is not rounded"),
        (FP32, {"rounding_seed": -1}, "rounding_seed must be an integer"),
        (FP32, {"rounding_seed": 2**63}, "rounding_seed must be an integer of 0 to"),
        (FP32, {"rounding_seed": True}, "rounding_seed must be an integer"),
    ],
)
def test_what_does_not_fit_is_named(dtype: torch.dtype, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Adam([torch.nn.Parameter(torch.zeros(4, dtype=dtype))], **options)
    optimizer = Adam([torch.nn.Parameter(torch.zeros(4))])
    options.pop("rounding_seed", None)
    if options:
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4, dtype=dtype))], **options})
    assert len(optimizer.param_groups) == 1


def test_second_moments_that_cannot_decay_are_warned_of_once() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(64, 64))]} for _ in range(2)]
    with pytest.warns(UserWarning, match="cannot decay") as found:
        AdamW(groups, state_dtype="8bit", stochastic_rounding=False)
    # It names the line that asked.
    assert [warning.filename for warning in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW([torch.nn.Parameter(torch.zeros(64, 64))], state_dtype="8bit")
        AdamW([torch.nn.Parameter(torch.zeros(4))], betas=(0.9, 0.95), state_dtype=BF16, stochastic_rounding=False)


@pytest.mark.parametrize("is_lazy", [False, True])
def test_second_moments_that_there_will_not_be_or_are_not_known_are_not_warned_of(is_lazy: bool) -> None:
    frozen = torch.nn.Parameter(torch.zeros(64, 64), requires_grad=False)
    param = torch.nn.UninitializedParameter(dtype=BF16) if is_lazy else frozen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW([param], state_dtype="8bit", stochastic_rounding=False, master_weights="split16")


def test_the_maximum_is_rounded_upwards_and_never_shrinks() -> None:
    params, optimizer = make("bf16 states, amsgrad, average", ((64, 64),))
    before = torch.zeros(64, 64)
    for step in range(20):
        give_gradients(params, step)
        optimizer.step()
        state = optimizer.state[params[0]]
        assert (state["max_exp_avg_sq"] >= before).all()
        before = state["max_exp_avg_sq"].float()
    assert (before >= state["exp_avg_sq"].float() * (1 - 2**-7)).all()


def test_from_torch_and_swap_take_modes() -> None:
    theirs = torch.nn.Parameter(torch.randn(64, 64))
    original = torch.optim.AdamW([theirs])
    theirs.grad = torch.randn(64, 64)
    original.step()
    ours = AdamW.from_torch(original, state_dtype="8bit")
    assert set(ours.state[theirs]) >= {"exp_avg_q8", "exp_avg_sq_scale"}
    ours.step()
    with swap(state_dtype="8bit"):
        swapped = torch.optim.Adam([theirs])
    swapped.step()
    assert "exp_avg_q8" in swapped.state[theirs]


def held_during(call: Callable[[], Any]) -> list[int]:
    """Bytes of tensors on the CPU after each time that a call took or freed some, less those from before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities, acc_events=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return list(accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("mode", ["bf16 states", "split8, 8bit", "split8, 8bit, amsgrad, average"])
def test_a_step_takes_8_mib_of_scratch_memory_at_most(mode: str) -> None:
    """It does not grow with the tensor."""
    params, optimizer = make(mode, ((2048, 512),), "native")
    train(params, optimizer, 1)
    held = held_during(optimizer.step)
    # NumPy's root of a piece is not among them.
    peak = max(held) + 4 * PIECE
    assert 16 * PIECE < peak <= 2**23 < 4 * params[0].numel() * 4
    assert abs(held[-1]) < 4096


@pytest.mark.parametrize("are_tensors", [False, True])
def test_betas_that_change_widen_the_bound(are_tensors: bool) -> None:
    own = [torch.tensor(beta, dtype=torch.float64) for beta in (0.85, 0.999)]
    params, optimizer = make("8bit", betas=own if are_tensors else (0.85, 0.999))

    def change(betas: tuple[float, float]) -> None:
        if are_tensors:
            for tensor, beta in zip(own, betas, strict=True):
                tensor.fill_(beta)
        else:
            optimizer.param_groups[0]["betas"] = betas

    train(params, optimizer, 1)
    # One that the betas imply is not saved.
    assert "bound_betas" not in optimizer.state_dict()["param_groups"][0]
    change((0.95, 0.999))
    train(params, optimizer, 1, 1)
    expected = (0.95, 0.999, moment_bound(0.85, 0.999, math.inf))
    assert optimizer.param_groups[0]["bound_betas"] == expected
    assert optimizer.state_dict()["param_groups"][0]["bound_betas"] == expected
    # Moments of the first betas are still among those that are made with the third.
    change((0.97, 0.99))
    train(params, optimizer, 1, 2)
    assert moment_bound(0.97, 0.99, math.inf) < expected[2]
    assert optimizer.param_groups[0]["bound_betas"] == (0.97, 0.99, expected[2])


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_a_default_device_of_others_does_not_matter(mode: str, backend: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        params, optimizer = make(mode, SHAPES[:1], backend)
        give_gradients(params, 0)
        with torch.device(device):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        found.append(params)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("is_native", [False, True])
def test_a_file_in_the_other_form_counts_where_it_was_written_beside_what_was_there(is_native: bool) -> None:
    """As `torch.distributed.checkpoint` does it, which writes over what it finds and adds the rest."""
    params, there = make("8bit", native_state_dict=is_native)
    train(params, there, 2)
    theirs, other = make("8bit", native_state_dict=not is_native)
    train(theirs, other, 2, first=2)
    saved, own = other.state_dict(), there.state_dict()
    own["state"] = {key: {**entries, **saved["state"][key]} for key, entries in own["state"].items()}
    there.load_state_dict(own)
    other.load_state_dict(saved)
    for param, its in zip(params, theirs, strict=True):
        for key in ("exp_avg_q8", "exp_avg_scale", "exp_avg_sq_q8", "exp_avg_sq_scale"):
            assert torch.equal(there.state[param][key], other.state[its][key])
