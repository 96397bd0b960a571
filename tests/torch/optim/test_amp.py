import itertools
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam, AdamW, swap

from .judging import judged_step, make_params, params_of, place, same_bits, set_grads, snapshots
from .support import no_waits

BACKENDS = ["native", "eager", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def make(backend: str, device: torch.device, **options: Any) -> Adam:
    return Adam(make_params(device=place(backend, device)), epsilon_hat=False, backend=backend, **options)


def scaled_grads(optimizer: torch.optim.Optimizer, number: int, scale: float) -> None:
    set_grads(params_of(optimizer), number)
    for param in params_of(optimizer):
        param.grad.mul_(scale)


def set_amp(optimizer: Any, grad_scale: float | None, found_inf: float | None) -> None:
    """What a GradScaler does before a step; it removes the attributes after it."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None:
            setattr(optimizer, name, torch.tensor([value], device=params_of(optimizer)[0].device))
        elif hasattr(optimizer, name):
            delattr(optimizer, name)


def test_a_scaler_drives_ours_as_it_drives_pytorchs(backend: str, device: torch.device) -> None:
    ours = make(backend, device, fused=True)
    theirs = torch.optim.Adam(make_params(device=place(backend, device)), fused=True)
    scales = []
    for optimizer in (ours, theirs):
        where = params_of(optimizer)[0].device.type
        scaler = torch.amp.GradScaler(where, init_scale=4.0, growth_interval=2)
        scales.append([])
        for number in range(4):
            optimizer.zero_grad(set_to_none=True)
            loss = sum((param.double() * (number + 1)).sin().sum() for param in params_of(optimizer))
            scaler.scale(loss).backward()
            if number == 1:
                params_of(optimizer)[1].grad[2] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            scales[-1].append(scaler.get_scale())
    assert scales[0] == scales[1] == [4.0, 2.0, 2.0, 4.0]
    assert ours.n_skipped_steps == 1
    assert {int(state["step"]) for state in ours.state.values()} == {3}
    for mine, their in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)
        # Parameters are the same for gradients that are all scaled alike.
        moments = (optimizer.state[param]["exp_avg"] for optimizer, param in ((ours, mine), (theirs, their)))
        torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-6)


def test_gradients_are_divided_by_the_scale_inside_the_step(backend: str, device: torch.device) -> None:
    scaled, plain = make(backend, device), make(backend, device)
    for number in range(2):
        scaled_grads(scaled, number, 1024.0)
        set_grads(params_of(plain), number)
        set_amp(scaled, 1024.0, 0.0)
        scaled.step()
        plain.step()
    # A power of two leaves every significand as it is.
    assert same_bits(snapshots(scaled), snapshots(plain))


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_a_step_with_something_infinite_is_skipped(
    backend: str, device: torch.device, grad_scale: float | None, found_inf: float
) -> None:
    optimizer = make(backend, device, amsgrad=True)
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    before = snapshots(optimizer)
    set_grads(params_of(optimizer), 1)
    params_of(optimizer)[0].grad.fill_(torch.nan)
    set_amp(optimizer, grad_scale, found_inf)
    optimizer.step()
    assert same_bits(snapshots(optimizer), before)
    assert optimizer.n_skipped_steps == 1
    set_amp(optimizer, None, None)
    set_grads(params_of(optimizer), 2)
    judged_step(optimizer)
    assert optimizer.n_skipped_steps == 1


@pytest.mark.parametrize("backend", [*BACKENDS, "triton beside eager"])
def test_a_skipped_step_has_the_norm_of_its_gradients(backend: str, device: torch.device) -> None:
    name = backend.split()[0]
    values = torch.zeros(2, 4, 2, device=place(name, device))
    # One that is not dense goes the eager way.
    second = values[1, :, 0] if backend == "triton beside eager" else torch.zeros_like(values[1, :, 0])
    params = [torch.nn.Parameter(each) for each in (values[0, :2], second)]
    optimizer = Adam(params, max_grad_norm=1.0, fused=True, backend=name)
    for size, found_inf in ((1.0, 0.0), (3.0, 1.0)):
        for param in params:
            param.grad = torch.full_like(param, size)
        set_amp(optimizer, 2.0, found_inf)
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(size / 2.0 * 8**0.5)
    assert optimizer.n_skipped_steps == 1


def test_a_step_without_anything_infinite_is_taken_without_a_scale(backend: str, device: torch.device) -> None:
    optimizer = make(backend, device)
    set_amp(optimizer, None, 0.0)
    for number in range(2):
        set_grads(params_of(optimizer), number)
        judged_step(optimizer)
    assert optimizer.n_skipped_steps == 0


def test_a_first_step_that_is_skipped_leaves_everything_at_its_start(backend: str, device: torch.device) -> None:
    optimizer = make(backend, device)
    before = snapshots(optimizer)
    set_grads(params_of(optimizer), 0)
    set_amp(optimizer, 2.0, 1.0)
    optimizer.step()
    assert same_bits(snapshots(optimizer), before)


def test_a_user_who_unscales_to_clip_gets_the_same_steps() -> None:
    """After `unscale_` the scaler hands over no scale, only what it found."""
    results = []
    for make_optimizer in (lambda p: AdamW(p, epsilon_hat=False), lambda p: torch.optim.AdamW(p, fused=True)):
        params = make_params()
        optimizer = make_optimizer(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for number, bad in itertools.product(range(2), (False, True)):
            scaled_grads(optimizer, number, scaler.get_scale() if scaler._scale is not None else 64.0)
            scaler.scale(torch.zeros(()))
            if bad:
                params[3].grad[0] = torch.inf
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append(params)
    for mine, their in zip(*results, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)
        assert mine.isfinite().all()


@pytest.mark.parametrize("fused", [None, True, False])
def test_the_step_unscales_for_fused_only_as_with_pytorch(fused: bool | None) -> None:
    assert Adam(make_params(), fused=fused)._step_supports_amp_scaling is bool(fused)
    with swap():
        assert torch.optim.Adam(make_params(), fused=fused)._step_supports_amp_scaling is bool(fused)


def test_a_scaler_skips_the_step_of_an_optimizer_that_does_not_unscale() -> None:
    optimizer = Adam(make_params(), fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    set_grads(params_of(optimizer), 0)
    params_of(optimizer)[0].grad.fill_(torch.inf)
    scaler.scale(torch.zeros(()))
    before = snapshots(optimizer)
    scaler.step(optimizer)
    assert same_bits(snapshots(optimizer), before)


@pytest.mark.gpu
def test_scaled_and_skipped_steps_never_wait_for_the_device() -> None:
    optimizer = make("triton", torch.device("cuda"))
    scaled_grads(optimizer, 0, 2.0)
    set_amp(optimizer, 2.0, 0.0)
    optimizer.step()
    found = torch.ones(1, device="cuda")
    with no_waits():
        optimizer.step()
        optimizer.found_inf = found
        optimizer.step()
    assert optimizer.n_skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5}, {"clip_norm": 0.5}, {"state_dtype": torch.bfloat16}], ids=str
)
def test_autocast_to_the_other_narrow_dtype_is_no_obstacle(
    options: dict[str, Any], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    place_of = place(backend, device)
    runs = [Adam(make_params(device=place_of, dtype=dtype), lr=0.1, backend=backend, **options) for _ in range(2)]
    for number, is_casting in ((0, True), (1, False)):
        for optimizer, wants in zip(runs, (is_casting, False), strict=True):
            set_grads(params_of(optimizer), number)
            with torch.autocast(place_of.type, dtype=other, enabled=wants):
                optimizer.step()
                assert torch.is_autocast_enabled(place_of.type) == wants
    assert all(map(torch.equal, *map(params_of, runs)))


@pytest.mark.parametrize("how", ["fused", "sums"])
def test_a_step_that_fails_leaves_no_scale_to_the_next_one(how: str, backend: str, device: torch.device) -> None:
    """PyTorch's scaler multiplies its scale by the one that it finds on an optimizer."""
    optimizers = [make(backend, device, fused=how == "fused" or None) for _ in range(2)]
    fails = [True]

    def hook(*_: Any) -> None:
        if fails and fails.pop():
            raise OSError("no space left on device")

    optimizers[0].register_step_pre_hook(hook)
    for optimizer in optimizers:
        scaler = torch.amp.GradScaler(params_of(optimizer)[0].device.type, init_scale=1024.0)
        scaler.scale(sum(param.double().sin().sum() for param in params_of(optimizer))).backward()
        if how == "sums":
            optimizer.sum_grad()
        if optimizer is optimizers[0]:
            with pytest.raises(OSError, match="no space"):
                scaler.step(optimizer)
        scaler.step(optimizer)
    assert not fails
    assert same_bits(*map(snapshots, optimizers))
