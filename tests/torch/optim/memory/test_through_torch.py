"""States that others handled: PyTorch's loader casts them, and some wrappers write them into `optimizer.state`."""

import copy
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from dragon.vm.torch.optim import SGD, AdamW

from ..judging import same_bits
from .modes import BF16, FP32, MODES, bits, give_gradients, make, train

pytestmark = pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")


def through_torch(saved: dict[str, Any], params: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """What PyTorch's AdamW saves of a dict that it has loaded."""
    theirs = torch.optim.AdamW([torch.nn.Parameter(param.detach().to(dtype)) for param in params])
    theirs.load_state_dict(copy.deepcopy(saved))
    return theirs.state_dict()


def resumed(mode: str, params: list[Tensor], saved: dict[str, Any], **options: Any) -> tuple[list[Tensor], AdamW]:
    theirs, optimizer = make(mode, **options)
    for mine, param in zip(theirs, params, strict=True):
        mine.data.copy_(param)
    optimizer.load_state_dict(saved)
    return theirs, optimizer


@pytest.mark.parametrize("dtype", [FP32, torch.float64])
@pytest.mark.parametrize("mode", ["8bit", "8bit to nearest", "bf16 stochastic, 8bit"])
def test_codes_that_were_cast_are_codes(mode: str, dtype: torch.dtype) -> None:
    params, optimizer = make(mode, native_state_dict=True)
    train(params, optimizer, 2)
    saved = through_torch(optimizer.state_dict(), params, dtype)
    assert saved["state"][0]["exp_avg_q8"].dtype == dtype
    theirs, other = resumed(mode, params, saved)
    train(params, optimizer, 2, 2)
    train(theirs, other, 2, 2)
    assert bits(theirs, other) == bits(params, optimizer)


def test_codes_of_momentum_are_signed_whatever_their_dtype() -> None:
    param = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = SGD([param], lr=0.1, momentum=0.9, state_dtype="8bit", native_state_dict=True)
    param.grad = torch.randn(64, 64)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer_q8"] = saved["state"][0]["momentum_buffer_q8"].float()
    other = SGD([param], lr=0.1, momentum=0.9, state_dtype="8bit", native_state_dict=True)
    other.load_state_dict(saved)
    found, expected = other.state[param]["momentum_buffer_q8"], optimizer.state[param]["momentum_buffer_q8"]
    assert found.dtype == torch.int8
    assert torch.equal(found, expected)


@pytest.mark.parametrize("master", ["split16", "split8"])
def test_a_remainder_that_was_cast_is_exact(master: str) -> None:
    params, optimizer = make("split16", master_weights=master, native_state_dict=True)
    train(params, optimizer, 2)
    saved = through_torch(optimizer.state_dict(), params, BF16)
    assert saved["state"][0]["param_remainder"].dtype == BF16
    _, other = resumed("split16", params, saved, master_weights=master)
    for (_, found), (_, expected) in zip(other.master_weights(), optimizer.master_weights(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mode", "key", "dtype", "expected"),
    [
        ("8bit", "exp_avg_scale", BF16, FP32),
        ("8bit", "exp_avg_sq_scale", torch.float16, FP32),
        ("8bit", "exp_avg_q8", torch.uint8, torch.int8),
        ("8bit", "exp_avg_sq_q8", "halved", torch.uint8),
        ("split16", "param_remainder", FP32, torch.int16),
    ],
)
def test_parts_that_a_cast_has_changed_are_refused(mode: str, key: str, dtype: Any, expected: torch.dtype) -> None:
    params, optimizer = make(mode, native_state_dict=True)
    train(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][1]
    state[key] = state[key] / 2 if dtype == "halved" else state[key].to(dtype)
    theirs, other = make(mode)
    train(theirs, other, 1)
    before = bits(theirs, other)
    with pytest.raises(
        ValueError, match=rf"{key} of shape .* and {state[key].dtype} instead of {expected} for par"
    ):
        other.load_state_dict(saved)
    assert bits(theirs, other) == before


def put(saved: dict[str, Any], params: list[Tensor], optimizer: AdamW) -> None:
    """Write states and options as ZeroRedundancyOptimizer does, which calls no `load_state_dict`."""
    for group, said in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update((name, value) for name, value in said.items() if name != "params")
    for param, state in zip(params, copy.deepcopy(saved["state"]).values(), strict=True):
        optimizer.state[param] = state


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("n_before", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_states_that_were_put_there_go_on_bit_by_bit(mode: str, n_before: int, native: bool) -> None:
    params, optimizer = make(mode, native_state_dict=native)
    train(params, optimizer, 2)
    saved = optimizer.state_dict()
    theirs, other = make(mode, native_state_dict=native)
    train(theirs, other, n_before, 7)
    with torch.no_grad():
        for mine, param in zip(theirs, params, strict=True):
            mine.copy_(param)
    put(saved, theirs, other)
    for (_, found), (_, expected) in zip(other.master_weights(), optimizer.master_weights(), strict=True):
        assert torch.equal(found, expected)
    assert same_bits(other.state_dict()["state"], saved["state"])
    train(params, optimizer, 2, 2)
    train(theirs, other, 2, 2)
    assert bits(theirs, other) == bits(params, optimizer)
    assert other.memory() == optimizer.memory()


def test_codes_that_were_put_there_are_walked_as_they_were_saved() -> None:
    param = torch.nn.Parameter(torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last))
    optimizer = AdamW([param], state_dtype="8bit", native_state_dict=True)
    give_gradients([param], 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())["state"][0]
    assert saved["storage"] > 1
    theirs = torch.nn.Parameter(param.detach().clone())
    other = AdamW([theirs], state_dtype="8bit")
    other.state[theirs] = {
        key: value.contiguous() if torch.is_tensor(value) else value for key, value in saved.items()
    }
    train([param], optimizer, 1, 1)
    train([theirs], other, 1, 1)
    assert same_bits(other.state[theirs], optimizer.state[param])
    assert torch.equal(theirs, param)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_scales_that_were_put_there_may_lie_in_any_order(backend: str) -> None:
    runs = []
    for is_turned in (False, True):
        params, optimizer = make("8bit", [(80, 192)], backend)
        train(params, optimizer, 1)
        for key in ("exp_avg_scale", "exp_avg_sq_scale") if is_turned else ():
            optimizer.state[params[0]][key] = optimizer.state[params[0]][key].t().contiguous().t()
        train(params, optimizer, 1, 1)
        runs.append(bits(params, optimizer))
    assert runs[0] == runs[1]


def test_a_master_that_was_put_in_front_of_another_one_is_saved() -> None:
    params, optimizer = make("split16", [(64, 64)])
    train(params, optimizer, 1)
    put_there = optimizer.state_dict()["state"][0]["master_param"].clone()
    train(params, optimizer, 1, 1)
    optimizer.state[params[0]] = {"master_param": put_there, **optimizer.state[params[0]]}
    assert torch.equal(optimizer.state_dict()["state"][0]["master_param"], put_there)


@pytest.mark.parametrize("master", ["split16", "split8", FP32])
def test_a_call_drops_a_master_that_was_put_there(master: Any) -> None:
    params, optimizer = make("split16", master_weights=master)
    train(params, optimizer, 2)
    put(optimizer.state_dict(), params, optimizer)
    assert optimizer.memory()["masters"] == 4 * sum(param.numel() for param in params)
    optimizer.resync_master()
    for _ in range(2):
        for (_, value), param in zip(optimizer.master_weights(), params, strict=True):
            assert torch.equal(value, param.float())
        optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
        train(params, optimizer, 1, 3)


@pytest.mark.parametrize(
    ("mode", "key", "found"),
    [
        ("8bit", "exp_avg_scale", None),
        ("8bit", "exp_avg_scale", BF16),
        ("8bit", "exp_avg_q8", torch.uint8),
        ("split16", "param_remainder", FP32),
        ("split16", "master_param", "1, 192"),
    ],
)
def test_a_step_refuses_what_was_put_there_and_does_not_fit(mode: str, key: str, found: Any) -> None:
    params, optimizer = make(mode, native_state_dict=key != "master_param")
    train(params, optimizer, 1)
    put(optimizer.state_dict(), params, optimizer)
    state = optimizer.state[params[1]]
    value = state.pop(key)
    if found is not None:
        state[key] = value.to(found) if isinstance(found, torch.dtype) else value[:1]
    give_gradients(params, 2)
    before = bits(params, optimizer)
    with pytest.raises(ValueError, match=rf"the state of .* has {key} of .*{found}"):
        optimizer.step()
    assert bits(params, optimizer) == before


def test_a_remainder_of_8_bits_that_was_cast_in_its_place_is_read_as_such() -> None:
    """As PyTorch's loader casts it where a wrapper calls that."""
    runs = []
    for is_cast in (False, True):
        params, optimizer = make("split8, 8bit")
        train(params, optimizer, 2)
        for state in optimizer.state.values() if is_cast else ():
            if "param_remainder" in state:
                state["param_remainder"] = state["param_remainder"].to(BF16)
        train(params, optimizer, 2, 2)
        runs.append(bits(params, optimizer))
    assert runs[0] == runs[1]


def test_loaded_states_of_sgd_have_the_entries_that_its_step_makes() -> None:
    """PyTorch's checkpoint functions fail at an entry of a whole dict that the loading optimizer has not."""
    param = torch.nn.Parameter(torch.randn(64, 64).to(BF16))
    options = {"lr": 0.1, "momentum": 0.9, "master_weights": "split8", "native_state_dict": True}
    optimizer, other = (SGD([param], **options) for _ in range(2))
    param.grad = torch.ones_like(param)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert other.state[param].keys() == optimizer.state[param].keys()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_passes_a_dict_with_integer_keys(tmp_path: Path) -> None:
    """The saved codes are walked in another order than those of the optimizer that loads them."""
    weight = torch.randn(4, 8, 16, 16)
    params = [torch.nn.Parameter(weight.to(memory_format=torch.channels_last)), torch.nn.Parameter(weight)]
    optimizer, other = (AdamW([param], state_dtype="8bit", native_state_dict=True) for param in params)
    for param, each in zip(params, (optimizer, other), strict=True):
        give_gradients([param], 0)
        each.step()
    dcp.save(optimizer.state_dict(), checkpoint_id=tmp_path)
    saved = other.state_dict()
    dcp.load(saved, checkpoint_id=tmp_path)
    found = []
    for loaded in (saved, optimizer.state_dict()):
        other.load_state_dict(loaded)
        assert list(other.state) == params[1:]
        found.append(copy.deepcopy(other.state[params[1]]))
    assert same_bits(*found)


OF_FP32 = ["8bit", "bf16 states", "one bf16 state"]
OF_BF16 = ["split8, 8bit", "split16, bf16 states", "fp32 masters, 8bit", "bf16 stochastic, 8bit"]


@pytest.mark.parametrize(("source", "target"), [*permutations(OF_FP32, 2), *permutations(OF_BF16, 2)])
@pytest.mark.parametrize("native", list(product([False, True], repeat=2)), ids=str)
def test_full_dicts_are_loaded_as_others_are(source: str, target: str, native: tuple[bool, bool]) -> None:
    """PyTorch writes them over what the optimizer that loads them would save, which may be in another form."""
    full = StateDictOptions(full_state_dict=True)
    dtype = MODES[source][0]
    models = [torch.nn.Linear(64, 64, dtype=dtype) for _ in range(3)]
    saving, *loading = (
        AdamW(model.parameters(), native_state_dict=is_native, **MODES[mode][1])
        for model, mode, is_native in zip(
            models, (source, target, target), (native[0], native[1], native[1]), strict=True
        )
    )
    train(list(models[0].parameters()), saving, 2)
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], saving, options=full))
    set_optimizer_state_dict(models[1], loading[0], saved, options=full)
    loading[1].load_state_dict(copy.deepcopy(saving.state_dict()))
    found, expected = (list(model.parameters()) for model in models[1:])
    assert [set(loading[0].state[param]) for param in found] == [
        set(loading[1].state[param]) for param in expected
    ]
    assert bits(found, loading[0]) == bits(expected, loading[1])
    for params, optimizer in ((found, loading[0]), (expected, loading[1])):
        train(params, optimizer, 1, 2)
    assert bits(found, loading[0]) == bits(expected, loading[1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", [{}, {"full_state_dict": True}], ids=str)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("mode", ["split16", "split8, 8bit", "fp32 masters, 8bit", "fp32 masters of fp16"])
def test_masters_that_were_loaded_in_their_place_are_kept(
    mode: str, native: bool, form: dict[str, bool], tmp_path: Path
) -> None:
    """The dicts that are filled have tensors of the model and the optimizer that load them."""
    dtype, options = MODES[mode]
    models = [torch.nn.Linear(64, 64, dtype=dtype) for _ in range(2)]
    optimizers = [AdamW(model.parameters(), native_state_dict=native, **options) for model in models]
    params = [list(model.parameters()) for model in models]
    train(params[0], optimizers[0], 2)
    states = [
        get_state_dict(*each, options=StateDictOptions(**form)) for each in zip(models, optimizers, strict=True)
    ]
    dcp.save(dict(zip("mo", states[0], strict=True)), checkpoint_id=tmp_path)
    dcp.load(dict(zip("mo", states[1], strict=True)), checkpoint_id=tmp_path)
    set_state_dict(
        models[1],
        optimizers[1],
        model_state_dict=states[1][0],
        optim_state_dict=states[1][1],
        options=StateDictOptions(**form),
    )
    for each in zip(params, optimizers, strict=True):
        train(*each, 2, 2)
    assert bits(params[1], optimizers[1]) == bits(params[0], optimizers[0])


@pytest.mark.parametrize("stream", [[0], {"a": 0}, "0", 0.5, -1, 2**32, torch.tensor(0)], ids=repr)
def test_a_stream_that_is_no_number_is_refused_before_anything_changes(stream: Any) -> None:
    params, optimizer = make("8bit")
    train(params, optimizer, 1)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    broken = {**saved, "state": {**saved["state"], 1: {**saved["state"][1], "stream": stream}}}
    with pytest.raises(ValueError, match=r"has a stream of .* for parameter 1, not a number"):
        optimizer.load_state_dict(broken)
    assert same_bits(optimizer.state_dict(), before)
    # Entries of others are theirs.
    optimizer.load_state_dict({**saved, "state": {**saved["state"], "others": {"stream": stream}}})


@pytest.mark.parametrize(
    ("make_optimizer", "key"),
    [(lambda p: AdamW([p], ema_decay=0.5), "ema"), (lambda p: SGD([p], momentum=0.5), "momentum_buffer")],
    ids=["ema", "momentum_buffer"],
)
@pytest.mark.parametrize("value", [[1.0, 1.0], 1.0, "x"], ids=repr)
def test_an_entry_that_is_no_tensor_is_refused_by_its_name(make_optimizer: Any, key: str, value: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(param)
    param.grad = torch.ones(2)
    optimizer.step()
    broken = optimizer.state_dict()
    broken["state"][0] = {**broken["state"][0], key: value}
    with pytest.raises(ValueError, match=f"loaded state dict has {key} of .* for parameter 0 of shape"):
        optimizer.load_state_dict(broken)
