"""`torch.amp.GradScaler` drives ours as it drives PyTorch's."""

from typing import Any

import pytest
import torch
from torch import nn

from dragon.vm.torch import optim as ours

from .both import BACKENDS, NAMES, WAYS, build

each_name = pytest.mark.parametrize("name", NAMES)
each_backend = pytest.mark.parametrize("backend", [None, *BACKENDS])
STEPS = 8
BAD_STEPS = (2, 5)


def options_of(name: str) -> dict[str, Any]:
    return {"lr": 0.05, "weight_decay": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}


def train(way: Any, name: str, *, clip: bool, fused: bool | None) -> list[dict[str, list[torch.Tensor]]]:
    """What is seen after each step: "results" are loss, scale, parameters and states; "grads" the gradients.

    Gradients of a skipped step are divided by the scale that a fused step leaves in them: rounding grows with it.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer = build(way, name, model.parameters(), **options_of(name), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2)
    seen = []
    for number in range(STEPS):
        optimizer.zero_grad()
        left_scale = scaler.get_scale() if fused and not clip and number in BAD_STEPS else 1.0
        inputs = torch.randn(6, 5)
        loss = model(inputs).square().mean()
        scaler.scale(loss).backward()
        if number in BAD_STEPS:
            with torch.no_grad():
                model[0].weight.grad[0, 0] = torch.inf if number % 2 else torch.nan
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        results, grads = [torch.tensor([loss.item(), scaler.get_scale()])], []
        for param in model.parameters():
            state = [value for _, value in sorted(optimizer.state.get(param, {}).items()) if value is not None]
            results += [value.detach().clone() for value in (param, *state) if value.dim()]
            assert param.grad is not None
            grads.append(param.grad / left_scale)
        seen.append({"results": results, "grads": grads})
    return seen


def assert_same(found: list[Any], expected: list[Any], part: str) -> None:
    assert len(found) == len(expected) == STEPS
    for number, (left, right) in enumerate(zip(found, expected, strict=True)):
        for one, other in zip(left[part], right[part], strict=True):
            # Clipped gradients have squares below 1e-6.
            atol = 1e-5 * float(other.nan_to_num(0, 0, 0).abs().max())
            torch.testing.assert_close(one, other, rtol=1e-5, atol=atol, equal_nan=True, msg=f"step {number}")


@each_name
@each_backend
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
def test_a_scaled_run_is_pytorchs(name: str, backend: str | None, clip: bool, fused: bool | None) -> None:
    expected = train((torch.optim, {}), name, clip=clip, fused=fused)
    found = train((ours, {} if backend is None else {"backend": backend}), name, clip=clip, fused=fused)
    assert_same(found, expected, "results")
    assert_same(found, expected, "grads")


@each_name
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_unscaled_after_a_scaled_step(name: str, way: Any) -> None:
    """Without ``fused=True`` the scaler itself unscales them, and who logs their norm sees it."""
    param = nn.Parameter(torch.ones(4))
    optimizer = build(way, name, [param], **options_of(name))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(param.grad, torch.ones(4))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("found", [1.0, 2.0])
def test_a_skipped_step_changes_nothing_whatever_found_it(way: Any, fused: Any, found: float) -> None:
    if way[0] is torch.optim and fused and found == 2.0:
        pytest.skip("PyTorch's fused step compares with 1 and takes 2 for none")
    param = nn.Parameter(torch.ones(4))
    optimizer = build(way, "Adam", [param], lr=0.1, fused=fused)
    param.grad = torch.ones(4)
    optimizer.step()
    before = (
        param.detach().clone(),
        optimizer.state[param]["exp_avg"].clone(),
        float(optimizer.state[param]["step"]),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(1))
    param.grad = torch.full((4,), torch.inf)
    if found == 1.0:
        scaler.step(optimizer)
    else:
        # What a scaler sets that has summed two devices.
        scaler.unscale_(optimizer)
        for value in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            value.mul_(2)
        scaler.step(optimizer)
    after = param.detach(), optimizer.state[param]["exp_avg"], float(optimizer.state[param]["step"])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2] == 1
