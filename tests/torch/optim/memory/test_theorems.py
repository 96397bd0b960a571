"""What never changes a bit, with random rounding on; what a skipped step leaves alone."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch

from dragon.vm.torch.optim import AdamW
from dragon.vm.torch.optim._formats.bits import numpy_of

from .modes import MODES, SHAPES, bits, give_gradients, make, train

STOCHASTIC = ["bf16 stochastic, bf16 states", "split8, 8bit", "8bit"]
pytestmark = pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_the_order_of_parameters_and_groups_changes_nothing_once_states_are_made(mode: str) -> None:
    params, optimizer = make(mode)
    train(params, optimizer, 2)
    others = copy.deepcopy(optimizer)
    theirs = others.param_groups[0]["params"]
    others.param_groups[0]["params"] = theirs[:1]
    others.add_param_group({"params": [theirs[2]]})
    others.add_param_group({"params": [theirs[1]]})
    train(params, optimizer, 3, 2)
    train(theirs[:3], others, 3, 2)
    assert bits(params, optimizer) == bits(theirs[:3], others)


@pytest.mark.parametrize("mode", ["bf16 states", *STOCHASTIC])
def test_small_tensors_of_differing_counts_are_updated_as_each_alone(mode: str) -> None:
    runs = [make(mode, backend=backend) for backend in ("native", "eager")]
    for params, optimizer in runs:
        for step, missing in enumerate((None, 0, None, 2, None)):
            give_gradients(params, step)
            if missing is not None:
                params[missing].grad = None
            optimizer.step()
    assert bits(*runs[0]) == bits(*runs[1])


def test_tensors_have_words_of_their_own() -> None:
    params, optimizer = make("bf16 stochastic, bf16 states", ((64, 64), (64, 64)))
    with torch.no_grad():
        params[1].copy_(params[0])
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    assert not torch.equal(params[0], params[1])


def test_each_step_and_each_seed_has_words_of_its_own() -> None:
    found = []
    for seed in (0, 1):
        params, optimizer = make("bf16 stochastic, bf16 states", ((64, 64),), lr=1e-4, rounding_seed=seed)
        before = params[0].detach().clone()
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        found.append(params[0] != before)
        with torch.no_grad():
            params[0].copy_(before)
        optimizer.step()
        found.append(params[0] != before)
    assert not any(torch.equal(a, b) for a, b in pairwise(found))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["8bit", "split8, 8bit", "bf16 stochastic, bf16 states"])
def test_a_narrow_default_dtype_changes_nothing(mode: str, default: torch.dtype) -> None:
    params, optimizer = make(mode)
    others, its = make(mode)
    for step in range(2):
        train(params, optimizer, 1, step)
        give_gradients(others, step)
        numpy_of.cache_clear()
        torch.set_default_dtype(default)
        try:
            its.step()
        finally:
            torch.set_default_dtype(torch.float32)
    assert bits(params, optimizer) == bits(others, its)


def test_roots_of_wide_parameters_are_wide_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        param = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))
        optimizer = AdamW([param], lr=0.1, state_dtype=torch.float32, backend="eager")
        param.grad = torch.linspace(0.1, 0.7, 10, dtype=torch.float64)
        optimizer.step()
        found.append(param)
        monkeypatch.setattr("dragon.vm.torch.optim._formats.bits.numpy_of", lambda device: None)
    assert torch.equal(*found)


def test_pytorchs_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    params, optimizer = make("split8, 8bit")
    train(params, optimizer, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("native", [False, True])
def test_a_run_resumes_exactly(mode: str, native: bool) -> None:
    params, optimizer = make(mode, native_state_dict=native)
    train(params, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [param.detach().clone() for param in params]
    train(params, optimizer, 3, 3)
    others, resumed = make(mode, native_state_dict=native)
    # The optimizer first: its masters must not depend on what the parameters are by then.
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    train(others, resumed, 3, 3)
    assert bits(others, resumed) == bits(params, optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_go_on_with_the_same_bits(mode: str) -> None:
    params, optimizer = make(mode)
    train(params, optimizer, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = other.param_groups[0]["params"]
        assert other.state_formats() == optimizer.state_formats()
        original = copy.deepcopy(optimizer)
        own = original.param_groups[0]["params"]
        train(theirs, other, 2, 2)
        train(own, original, 2, 2)
        assert bits(theirs, other) == bits(own, original)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_a_skipped_step_changes_no_bit(mode: str, backend: str) -> None:
    params, optimizer = make(mode, ((64, 64),), backend, skip_nonfinite=True)
    train(params, optimizer, 2)
    before = bits(params, optimizer)
    give_gradients(params, 5)
    params[0].grad.view(-1)[3] = float("inf")
    optimizer.step()
    assert bits(params, optimizer) == before
    assert optimizer.n_skipped_steps == 1


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_flatten_changes_no_bit(mode: str) -> None:
    ours, theirs = make(mode, flatten=True), make(mode)
    train(*ours, 3)
    train(*theirs, 3)
    assert bits(*ours) == bits(*theirs)


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_zeroing_gradients_in_the_step_and_summing_them_change_no_bit(mode: str) -> None:
    ours, theirs = make(mode, ((64, 64),), "triton"), make(mode, ((64, 64),), "triton")
    for step in range(2):
        give_gradients(ours[0], step)
        give_gradients(theirs[0], step)
        ours[1].step(zero_grad=True)
        theirs[1].sum_grad()
        theirs[1].step()
        assert not ours[0][0].grad.any()
    assert bits(*ours) == bits(*theirs)


def test_parameters_that_join_later_take_no_stream_that_is_in_use() -> None:
    params, optimizer = make("8bit")
    train(params, optimizer, 1)
    del optimizer.param_groups[0]["params"][:2]
    late = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(6)]
    optimizer.add_param_group({"params": late})
    for param in late[:2]:
        param.grad = torch.randn(64, 64)
    optimizer.step()
    streams = [optimizer.state[param]["stream"] for param in (*params, *late[:2])]
    assert len(set(streams)) == len(SHAPES) + 2
    # Nor one that is the position of a parameter, which may be loaded without a number.
    assert min(streams[-2:]) >= len(optimizer.param_groups[0]["params"]) + len(late)


def test_formats_may_differ_by_group_and_change() -> None:
    wide, narrow = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))
    optimizer = AdamW([{"params": [wide]}, {"params": [narrow], "state_dtype": "8bit"}], backend="eager")
    train([wide, narrow], optimizer, 2)
    assert "exp_avg" in optimizer.state[wide]
    assert "exp_avg_q8" in optimizer.state[narrow]
    stored = optimizer.state_dict()["state"][1]
    optimizer.param_groups[1]["state_dtype"] = None
    narrow.grad = torch.zeros_like(narrow)
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    assert set(optimizer.state[narrow]) == {"exp_avg", "exp_avg_sq", "step", "stream"}
    torch.testing.assert_close(optimizer.state[narrow]["exp_avg"], 0.9 * stored["exp_avg"], rtol=1e-6, atol=0)
