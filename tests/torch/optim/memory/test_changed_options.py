"""Storage options and betas that a program changes between steps."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim import SGD, Adam

from ..support import home

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ["eager", "native"]


@pytest.mark.parametrize(
    ("algorithm", "name", "known"),
    [
        (Adam, "momentum_buffer", "exp_avg, exp_avg_sq, max_exp_avg_sq"),
        (Adam, "exp_avgs", "exp_avg, exp_avg_sq, max_exp_avg_sq"),
        (Adam, "", "exp_avg, exp_avg_sq, max_exp_avg_sq"),
        (Adam, None, "exp_avg, exp_avg_sq, max_exp_avg_sq"),
        (SGD, "exp_avg", "momentum_buffer"),
    ],
)
def test_a_dtype_for_a_state_that_the_algorithm_lacks_is_refused(algorithm: Any, name: Any, known: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    text = f"^state_dtype: expected states among {known}, got {name!r}$"
    with pytest.raises(ValueError, match=text):
        algorithm([param], state_dtype={name: BF16})
    optimizer = algorithm([param])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "state_dtype": {name: None}})
    optimizer.param_groups[0]["state_dtype"] = {name: BF16}
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize(
    ("algorithm", "name", "switch"),
    [(Adam, "max_exp_avg_sq", {"amsgrad": True}), (SGD, "momentum_buffer", {"momentum": 0.9})],
)
def test_a_dtype_for_a_state_that_is_switched_on_later_is_kept(algorithm: Any, name: str, switch: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = algorithm([param], state_dtype={name: BF16})
    optimizer.param_groups[0].update(switch)
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param][name].dtype == BF16


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_follow_the_dtype_that_is_asked_for(backend: str) -> None:
    param = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Adam([param], state_dtype=BF16, backend=backend)

    def dtypes(asked: object) -> set[torch.dtype]:
        optimizer.param_groups[0]["state_dtype"] = asked
        param.grad = torch.randn(64, 64).to(param.dtype)
        optimizer.step()
        names = optimizer.state_formats()["0"]
        assert ("stochastic" in names["exp_avg_sq"]) == (asked == BF16)
        return {optimizer.state[param][key].dtype for key in ("exp_avg", "exp_avg_sq")}

    assert dtypes(BF16) == {BF16}
    assert dtypes(FP32) == {FP32}
    assert dtypes(BF16) == {BF16}
    # PyTorch's arithmetic is in the parameter's dtype.
    assert dtypes(None) == {FP32}
    param.data = param.data.to(BF16)
    assert dtypes(None) == {FP32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("master", [FP32, "split16", "split8"])
def test_a_master_that_is_given_up_leaves_nothing_behind(master: object, backend: str) -> None:
    param = torch.nn.Parameter(torch.randn(64, 64).to(BF16))
    optimizer = SGD([param], lr=1e-3, master_weights=master, backend=backend)

    def step() -> Tensor:
        param.grad = torch.randn(64, 64).to(BF16)
        optimizer.step()
        return dict(optimizer.master_weights()).get("0", param.detach().float())

    assert not torch.equal(step(), param.float())
    optimizer.param_groups[0]["master_weights"] = None
    assert torch.equal(step(), param.float())
    assert not optimizer.state[param]
    assert not optimizer.state_dict()["state"][0]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((0.0, 0.95), (0.9, 0.999)),
        ((0.9, 0.999), (0.95, 0.9)),
        ((0.9, 0.999), (0.99, 0.9)),
        ((0.5, 0.9), (0.9, 0.99)),
    ],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_changed_betas_leave_an_exact_first_moment_alone(
    first: tuple[float, float], then: tuple[float, float], backend: str
) -> None:
    def moment(cls: type[torch.optim.Optimizer], **options: Any) -> Tensor:
        param = torch.nn.Parameter(torch.zeros(64, device=home(backend)))
        optimizer = cls([param], lr=1e-3, betas=first, **options)
        for step in range(60):
            if step == 3:
                optimizer.param_groups[0]["betas"] = then
            # At first nothing and then much, or much and then nothing.
            grad = torch.where(torch.arange(64) < 32, 1.0 + 7 * (step >= 3), float(step < 3))
            param.grad = grad.to(param.device)
            optimizer.step()
        return optimizer.state[param]["exp_avg"]

    ours = moment(Adam, backend=backend, state_dtype={"exp_avg": FP32, "exp_avg_sq": BF16})
    torch.testing.assert_close(ours, moment(torch.optim.Adam), rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", ["set", "loaded", "taken over"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_changed_betas_cut_no_moment_that_stochastic_rounding_alone_makes_narrow(backend: str, how: str) -> None:
    """Second moments of bf16 parameters are narrow then without a `state_dtype`."""
    options: dict[str, Any] = {"lr": 1e-3, "backend": backend, "stochastic_rounding": True}
    param = torch.nn.Parameter(torch.zeros(64, dtype=BF16, device=home(backend)))
    optimizer = Adam([param], **options)
    for gradient in (*[1e-3] * 9, 1.0):
        param.grad = torch.full_like(param, gradient)
        optimizer.step()
    moment = optimizer.state[param]["exp_avg"].clone()
    if how == "taken over":
        optimizer = Adam.from_torch(optimizer, betas=(0.9, 0.99), **options)
    else:
        if how == "loaded":
            saved, optimizer = optimizer.state_dict(), Adam([param], **options)
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.9 * moment)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (0.9, 1.5), (1.5, 0.9), (float("nan"), 0.9)])
def test_betas_out_of_range_leave_no_bound_behind(betas: tuple[float, float]) -> None:
    param = torch.nn.Parameter(torch.ones(64))
    optimizer = Adam([param], state_dtype=BF16)
    param.grad = torch.ones(64)
    optimizer.step()
    before = optimizer.param_groups[0]["bound_betas"]
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match="Invalid beta parameter at index"):
        optimizer.step()
    assert optimizer.param_groups[0]["bound_betas"] == before


def stepped() -> tuple[Tensor, Adam]:
    """A parameter and an optimizer with narrow moments, after a step."""
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = Adam([param], lr=0.5, state_dtype=BF16)
    param.grad = torch.ones(8)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("betas", [("a", "b"), 5, None, (torch.ones(2), torch.ones(2))], ids=str)
def test_betas_that_are_no_numbers_load_and_are_refused_by_the_step(betas: Any) -> None:
    param, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["betas"] = betas
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["exp_avg"].dtype == BF16
    with pytest.raises((TypeError, ValueError), match="betas"):
        optimizer.step()


@pytest.mark.parametrize("bound", [5, (0.9,), "xyz", (0.9, 0.99, "x"), (0.9, math.nan)], ids=str)
def test_a_bound_that_no_state_dict_has_is_refused_before_anything_changes(bound: Any) -> None:
    param, optimizer = stepped()
    state, before = optimizer.state[param], param.tolist()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=0.25, bound_betas=bound)
    text = "bound_betas must be two or three numbers"
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(saved)
    assert optimizer.state[param] is state
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["bound_betas"] = bound
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    with pytest.raises(ValueError, match=text):
        Adam([{"params": [param], "bound_betas": bound}])
    assert param.tolist() == before


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_an_extremal_moment_behind_changed_betas_is_cut_by_no_backend(backend: str) -> None:
    def run(name: str) -> tuple[Tensor, Tensor]:
        param = torch.nn.Parameter(torch.zeros(64, device=home(name)))
        optimizer = Adam([param], lr=1e-3, backend=name, state_dtype={"exp_avg": FP32, "exp_avg_sq": BF16})
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            if step == 1:
                optimizer.param_groups[0]["betas"] = (0.0, 0.99)
            # The last gradient is all that there is: its moment is at the bound of exact Adam.
            param.grad = (torch.randn(64, generator=generator) * (100.0 * (step == 2))).to(param.device)
            optimizer.step()
        return optimizer.state[param]["exp_avg"].cpu(), param.grad.cpu()

    (eager, grad), (other, _) = run("eager"), run(backend)
    assert torch.equal(eager, grad)
    assert torch.equal(other, eager)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_maximum_begins_as_wide_as_the_second_moments(is_saved: bool, backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=BF16, device=home(backend)))
    wide, optimizer = Adam([param], state_dtype=FP32), Adam([param], backend=backend)
    param.grad = torch.full_like(param, 0.3)
    wide.step()
    optimizer.load_state_dict(wide.state_dict())
    optimizer.param_groups[0]["amsgrad"] = True
    if is_saved:
        optimizer.state_dict()
    optimizer.step()
    state = optimizer.state[param]
    assert state["max_exp_avg_sq"].dtype == FP32
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("backend", ["triton", *BACKENDS])
def test_an_average_that_has_begun_keeps_its_dtype(backend: str) -> None:
    param = torch.nn.Parameter(torch.linspace(1, 2, 9, dtype=BF16, device=home(backend)))
    optimizer = Adam([param], lr=0.1, ema_decay=0.5, backend=backend)
    for master in (None, FP32):
        optimizer.param_groups[0]["master_weights"] = master
        before = optimizer.state[param]["ema"].clone() if param in optimizer.state else param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        average = optimizer.state[param]["ema"]
        assert average.dtype == BF16
        torch.testing.assert_close(average, torch.lerp(before, param.detach(), 0.5), rtol=2**-7, atol=0)
