"""Masters of 16-bit parameters: exact, noticed when stale, and part of checkpoints."""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, AdamW
from dragon.vm.torch.optim._backends.host import HostGroup
from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._groups.entries import decode_master

from ..judging import same_bits
from .modes import BF16, FP32, bits, give_gradients, make, train

SPLITS: list[Any] = ["split16", "split8", FP32]


def values(optimizer: Any) -> list[torch.Tensor]:
    """All masters, of which there are some."""
    found = [value for _, value in optimizer.master_weights()]
    assert found
    return found


@pytest.mark.parametrize(("backend", "steps"), [("triton", 100), ("native", 3)])
def test_split16_is_an_fp32_run(backend: str, steps: int) -> None:
    """The run without a master is the kernels', which compute both alike; native's is torch's own."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(67, generator=generator).to(BF16)
    split, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours = AdamW([split], lr=1e-3, backend=backend, master_weights="split16")
    theirs = AdamW([wide], lr=1e-3, backend="triton")
    for _ in range(steps):
        split.grad = torch.randn(67, generator=generator).to(BF16)
        wide.grad = split.grad.float()
        ours.step()
        theirs.step()
    ((_, master),) = ours.master_weights()
    assert torch.equal(master, wide)
    assert torch.equal(ours.state[split]["exp_avg_sq"], theirs.state[wide]["exp_avg_sq"])


def test_split16_is_an_fp32_run_for_1000_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's own root, which a run without a mode takes, is wrong in the last bit of some numbers.
    monkeypatch.setattr(torch, "sqrt", square_root)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(67, generator=generator).to(BF16)
    split, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours = AdamW([split], lr=1e-3, backend="eager", master_weights="split16")
    theirs = AdamW([wide], lr=1e-3, backend="eager")
    for _ in range(1000):
        split.grad = torch.randn(67, generator=generator).to(BF16)
        wide.grad = split.grad.float()
        ours.step()
        theirs.step()
    ((_, master),) = ours.master_weights()
    assert torch.equal(master, wide)
    assert torch.equal(ours.state[split]["exp_avg_sq"], theirs.state[wide]["exp_avg_sq"])


@pytest.mark.parametrize("master", SPLITS)
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_small_updates_are_not_lost(master: Any, backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=BF16))
    optimizer = AdamW([param], lr=1e-4, weight_decay=0, backend=backend, master_weights=master)
    for _ in range(10):
        param.grad = torch.ones_like(param)
        optimizer.step()
    ((name, value),) = optimizer.master_weights()
    assert name == "0"
    assert float(value.mean()) == pytest.approx(1 - 1e-3, abs=2e-5)


@pytest.mark.parametrize("master", SPLITS)
def test_a_write_to_the_parameter_makes_it_its_own_master(master: Any) -> None:
    params, optimizer = make("split16", master_weights=master)
    train(params, optimizer, 2)
    with torch.no_grad():
        params[0].fill_(0.5)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    optimizer.step()
    masters = dict(optimizer.master_weights())
    assert torch.equal(masters["0"], torch.full((64, 64), 0.5))
    assert not torch.equal(masters["1"], params[1].float())


@pytest.mark.parametrize("master", SPLITS)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_an_interrupted_step_leaves_masters_alone(
    master: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.nn.Parameter(torch.ones(64, dtype=BF16)) for _ in range(2)]
    # Of two groups, which are not updated together.
    groups = [{"params": param} for param in params]
    optimizer = AdamW(groups, lr=1e-4, backend=backend, master_weights=master)
    plain, updated = HostGroup._update_all, []

    def update_all(self: HostGroup, *args: Any) -> None:
        if updated:
            raise KeyboardInterrupt
        plain(self, *args)
        updated.append(decode_master(params[0], optimizer.state[params[0]]).clone())

    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(HostGroup, "_update_all", update_all)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert not torch.equal(updated[0], updated[0].to(BF16).float())
    (_, found), _ = optimizer.master_weights()
    assert torch.equal(found, updated[0])


@pytest.mark.parametrize("master", SPLITS)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "master_weights", "from_torch", "swap_ema"])
def test_a_write_before_a_copy_is_noticed_too(master: Any, how: str) -> None:
    params, optimizer = make("split16", master_weights=master, ema_decay=0.5)
    train(params, optimizer, 2)
    with torch.no_grad():
        params[0].fill_(0.5)
    if how == "state_dict":
        saved = copy.deepcopy(optimizer.state_dict())
        theirs, other = make("split16", master_weights=master, ema_decay=0.5)
        theirs[0].data.fill_(0.5)
        other.load_state_dict(saved)
    elif how in ("master_weights", "swap_ema"):
        other = optimizer
        with optimizer.swap_ema() if how == "swap_ema" else nullcontext():
            pass
    elif how == "from_torch":
        other = type(optimizer).from_torch(optimizer)
    else:
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    masters = dict(other.master_weights())
    assert (masters["0"] == 0.5).all()
    assert not torch.equal(masters["1"], params[1].float())


@pytest.mark.parametrize("master", SPLITS)
def test_weights_may_be_loaded_after_the_optimizer(master: Any) -> None:
    """An fp32 master that does not round to the weights is not theirs; a remainder always is."""
    params, optimizer = make("split16", master_weights=master)
    train(params, optimizer, 2)
    theirs, other = make("split16", master_weights=master, lr=0.0, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0].update(lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        theirs[0].fill_(0.25)
        theirs[1].copy_(params[1])
        theirs[2].copy_(params[2])
    expected = values(optimizer)
    give_gradients(theirs, 3)
    other.step()
    masters = [value for _, value in other.master_weights()]
    assert (theirs[0] == 0.25).all()
    assert (masters[0] - 0.25).abs().max() <= 2**-10
    assert torch.equal(masters[1], expected[1])


@pytest.mark.parametrize("master", SPLITS)
@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("weights_first", [False, True])
def test_a_run_goes_back_to_its_checkpoint_bit_by_bit(master: Any, is_native: bool, weights_first: bool) -> None:
    params, optimizer = make("split16", [(64, 64)], master_weights=master, native_state_dict=is_native)
    train(params, optimizer, 2)
    weight, saved = params[0].detach().clone(), copy.deepcopy(optimizer.state_dict())
    results = []
    for _ in range(2):
        train(params, optimizer, 2, first=2)
        results.append(bits(params, optimizer))
        if not weights_first:
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            params[0].copy_(weight)
        if weights_first:
            optimizer.load_state_dict(saved)
    assert results[0] == results[1]


@pytest.mark.parametrize("master", SPLITS)
def test_a_look_at_the_averages_between_two_loads_leaves_masters_alone(master: Any) -> None:
    """They are trusted from `load_state_dict` to the next step, whatever is written."""
    params, optimizer = make("split16", master_weights=master, ema_decay=0.5)
    train(params, optimizer, 2)
    before, weights = values(optimizer), [param.detach().clone() for param in params]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with optimizer.swap_ema():
        pass
    with torch.no_grad():
        for param, weight in zip(params, weights, strict=True):
            param.copy_(weight)
    assert same_bits(before, values(optimizer))


def test_a_remainder_of_16_bits_is_not_read_as_one_of_8_whatever_its_bits() -> None:
    params, optimizer = make("split16", [(1,)], native_state_dict=True)
    train(params, optimizer, 1)
    # A dict has it as bf16 of the same bits, which are 1.
    optimizer.state[params[0]]["param_remainder"].fill_(0x3F80)
    ((_, before),) = optimizer.master_weights()
    optimizer.load_state_dict(optimizer.state_dict())
    ((_, after),) = optimizer.master_weights()
    assert torch.equal(after, before)


def test_a_dict_of_averages_leaves_masters_alone() -> None:
    params, optimizer = make("split16", ema_decay=0.5)
    train(params, optimizer, 2)
    before = values(optimizer)
    with optimizer.swap_ema():
        saved = optimizer.state_dict()["state"]
        inside = values(optimizer)
        with pytest.raises(RuntimeError, match="inside swap_ema"):
            copy.deepcopy(optimizer)
    assert same_bits(inside, before)
    assert all(torch.equal(saved[i]["master_param"], before[i]) for i in range(3))
    assert same_bits(before, values(optimizer))


@pytest.mark.parametrize("master", SPLITS)
@pytest.mark.parametrize("is_saved", [False, True], ids=["ours", "put there as saved"])
def test_what_pytorch_does_not_count_needs_a_call(is_saved: bool, master: Any) -> None:
    params, optimizer = make("split16", master_weights=master)
    train(params, optimizer, 2)
    if is_saved:
        optimizer.state.update(zip(params, optimizer.state_dict()["state"].values(), strict=True))
    params[0].data.fill_(0.5)
    optimizer.resync_master()
    for (_, value), param in zip(optimizer.master_weights(), params, strict=True):
        assert torch.equal(value, param.float())


def test_a_write_to_a_parameter_without_a_state_is_no_obstacle() -> None:
    params, optimizer = make("split16")
    optimizer.resync_master()
    train(params, optimizer, 1)
    with torch.no_grad():
        params[0].fill_(0.5)
    optimizer.state.clear()
    train(params, optimizer, 1)


def test_a_write_is_noticed_once() -> None:
    params, optimizer = make("split16", master_weights=FP32)
    train(params, optimizer, 2)
    with torch.no_grad():
        params[0].fill_(0.5)
    optimizer.state_dict()
    optimizer.state[params[0]]["param_master"].fill_(0.5 + 2**-12)
    assert (dict(optimizer.master_weights())["0"] == 0.5 + 2**-12).all()


@pytest.mark.parametrize("master", SPLITS)
def test_masters_are_told_as_copies(master: Any) -> None:
    param = torch.nn.Parameter(torch.randn(3).to(BF16))
    optimizer = AdamW([param], master_weights=master)
    train([param], optimizer, 1)
    before = list(map(torch.clone, values(optimizer)))
    for value in values(optimizer):
        value.zero_()
    assert all(map(torch.equal, values(optimizer), before))


@pytest.mark.parametrize("master", SPLITS)
def test_a_frozen_parameter_of_inference_mode_is_no_obstacle(master: Any) -> None:
    with torch.inference_mode():
        frozen = torch.nn.Parameter(torch.randn(3, dtype=BF16), requires_grad=False)
    param = torch.nn.Parameter(torch.randn(3).to(BF16))
    optimizer = AdamW([frozen, param], master_weights=master)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state_dict()["state"].keys() == {1}
    with torch.no_grad():
        param.fill_(0.5)
    assert [value.unique().tolist() for _, value in optimizer.master_weights()] == [[0.5]]


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("master", SPLITS)
def test_weights_that_are_assigned_to_data_stay(master: Any, backend: str) -> None:
    params, optimizer = make("split16", master_weights=master, backend=backend)
    train(params, optimizer, 2)
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    assigned = [torch.randn_like(param) for param in params]
    for param, value in zip(params, assigned, strict=True):
        param.data = value.clone()
    give_gradients(params, 9)
    optimizer.step()
    assert all(map(torch.equal, params, assigned))


def test_the_same_weights_in_other_memory_leave_masters_alone() -> None:
    params, optimizer = make("split16", master_weights=FP32)
    train(params, optimizer, 2)
    before = values(optimizer)
    assert not all(torch.equal(value, param.float()) for value, param in zip(before, params, strict=True))
    for param in params:
        param.data = param.data.clone()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    give_gradients(params, 9)
    optimizer.step()
    assert same_bits(before, values(optimizer))


def test_an_exchange_with_the_averages_leaves_masters_alone() -> None:
    params, optimizer = make("split16", ema_decay=0.5)
    train(params, optimizer, 2)
    before = values(optimizer)
    with optimizer.swap_ema():
        assert torch.equal(params[0], optimizer.state[params[0]]["ema"].to(BF16))
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    give_gradients(params, 9)
    optimizer.step()
    assert same_bits(before, values(optimizer))


@pytest.mark.parametrize("master", SPLITS)
def test_a_master_travels_in_pytorchs_form(master: Any) -> None:
    params, optimizer = make("split16", master_weights=master)
    train(params, optimizer, 2)
    masters = values(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(torch.equal(saved["state"][i]["master_param"], masters[i]) for i in range(3))
    for other in SPLITS if master == "split8" else [master]:
        # 24 bits fit in every master.
        theirs, loaded = make("split16", master_weights=other)
        for mine, param in zip(theirs, params, strict=True):
            mine.data.copy_(param)
        loaded.load_state_dict(saved)
        assert same_bits(masters, values(loaded))


def test_nan_and_infinity_reach_the_parameter() -> None:
    for master in SPLITS:
        params, optimizer = make("split16", ((64, 64),), master_weights=master)
        params[0].grad = torch.zeros_like(params[0])
        params[0].grad.view(-1)[0] = float("nan")
        optimizer.step()
        assert params[0].isnan().sum() == 1


@pytest.mark.parametrize("master", ["split16", "split8", FP32])
def test_sgd_has_masters_too(master: Any) -> None:
    param = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = SGD([param], lr=1e-4, momentum=0.9, master_weights=master)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    ((_, value),) = optimizer.master_weights()
    assert value.tolist() == pytest.approx([1 - 5.61e-4] * 64, abs=2e-5)
    assert optimizer.state[param]["momentum_buffer"].dtype == FP32


@pytest.mark.parametrize("master", SPLITS)
def test_averages_of_a_removed_group_leave_its_masters_alone(master: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(64, dtype=BF16)) for _ in range(2)]
    groups = [{"params": [param]} for param in params]
    optimizer = AdamW(groups, lr=1e-4, ema_decay=0.5, master_weights=master)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = values(optimizer)
    removed = optimizer.param_groups.pop()
    with optimizer.swap_ema():
        pass
    optimizer.param_groups.append(removed)
    assert same_bits(before, values(optimizer))
    assert not torch.equal(before[1], params[1].float())


@pytest.mark.parametrize("master", SPLITS)
def test_an_exchange_within_an_exchange_leaves_masters_alone(master: Any) -> None:
    param = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = AdamW([param], lr=1e-4, ema_decay=0.5, master_weights=master)
    param.grad = torch.ones_like(param)
    optimizer.step()
    ((_, before),) = optimizer.master_weights()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="exchanged already"), optimizer.swap_ema():
        pass
    ((_, after),) = optimizer.master_weights()
    assert torch.equal(before, after)


def test_entries_of_others_in_a_state_leave_masters_alone() -> None:
    params, optimizer = make("split16", ema_decay=0.5)
    train(params, optimizer, 2)
    before = values(optimizer)
    optimizer.state["run"] = {"epoch": 1}
    with optimizer.swap_ema():
        pass
    assert same_bits(before, values(optimizer))
