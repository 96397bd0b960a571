"""What only a device can show of a step: waiting, uploads, norms of many elements, sizes past int32."""

import math

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._plan.step import StepPlan

from .support import no_waits

pytestmark = pytest.mark.gpu


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (17,), (), (0,), (70001,), (64, 33)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def n_uploads(optimizer):
    plans = optimizer._updater.plans.latest()
    return sum(device._launches.table.n_uploads for plan in plans for device in plan._devices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"max_grad_norm": 0.1, "skip_nonfinite": True}])
def test_kernels_do_what_the_eager_backend_does(device, dtype, options):
    params, twins = parameters(device, dtype), parameters(device, dtype)
    optimizer = Adam(params, lr=0.01, weight_decay=0.1, backend="triton", **options)
    twin = Adam(twins, lr=0.01, weight_decay=0.1, backend="eager", **options)
    for seed in range(3):
        give_grads(params, seed)
        give_grads(twins, seed)
        optimizer.step()
        twin.step()
    eps = torch.finfo(dtype).eps
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param, other, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("make", [Adam, SGD])
def test_a_step_never_waits_for_the_device(device, make):
    if device.type != "cuda":
        pytest.skip("only CUDA reports that the host waits")
    params = parameters(device)
    optimizer = make(params, max_grad_norm=1.0, skip_nonfinite=True)
    give_grads(params, 0)
    optimizer.step()
    torch.cuda.synchronize()
    with no_waits():
        for lr in (0.1, 0.2, 0.2):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.sum_grad()
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.zero_grad()
    assert optimizer.n_skipped_steps == 0


def test_unchanged_steps_upload_nothing_and_changed_ones_upload_once(device):
    params = parameters(device)
    optimizer = Adam(params)
    give_grads(params, 0)
    optimizer.step()
    before = n_uploads(optimizer)
    optimizer.step()
    assert n_uploads(optimizer) == before
    optimizer.param_groups[0]["lr"] = 0.5
    give_grads(params, 1)
    optimizer.step()
    assert n_uploads(optimizer) == before + 1


def test_fresh_gradients_need_no_new_plan_and_memory_that_moved_does(device, monkeypatch):
    params = parameters(device)
    optimizer = Adam(params)
    give_grads(params, 0)
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(StepPlan, "__init__", lambda *_: pytest.fail("a step was prepared"))
        for seed in range(1, 20):
            optimizer.zero_grad(set_to_none=True)
            # Blocks that the gradients do not get, so that they move.
            kept = [torch.zeros_like(param) for param in params[: seed % 4]]
            give_grads(params, seed)
            versions = [param._version for param in params]
            before = [param.detach().clone() for param in params]
            optimizer.step()
            assert all(param._version > version for param, version in zip(params, versions, strict=True))
            assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True) if p.numel())
            del kept
    old = params[1].data
    before = old.clone()
    params[1].data = old.clone()
    give_grads(params, 20)
    optimizer.step()
    assert torch.equal(old, before)
    assert not torch.equal(params[1], before)


@pytest.mark.parametrize("take_away", [dict.clear, lambda state: [entries.clear() for entries in state.values()]])
def test_the_memory_of_states_that_were_taken_away_is_free_at_once(device, take_away):
    if device.type != "cuda":
        pytest.skip("only CUDA tells how much memory is allocated")
    params = [torch.nn.Parameter(torch.zeros(1000, 1000, device=device)) for _ in range(4)]
    optimizer = Adam(params)
    for seed in range(2):
        give_grads(params, seed)
        optimizer.step()
    before = torch.cuda.memory_allocated(device)
    take_away(optimizer.state)
    assert before - torch.cuda.memory_allocated(device) >= 2 * 4 * sum(param.numel() for param in params)


def test_the_norm_of_a_hundred_million_elements_is_accurate_and_always_the_same(device):
    grad = torch.rand(100_000_000, device=device)
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    optimizer = SGD([param], lr=0.0, max_grad_norm=1.0)
    norms = []
    for _ in range(3):
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    expected = math.sqrt(float(grad.double().square().sum()))
    assert abs(norms[0] - expected) <= 4 * torch.finfo(torch.float32).eps * expected
    assert norms[0] == norms[1] == norms[2]


def test_more_elements_than_int32_counts_are_all_updated(device):
    numel = 2**31 + 17
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 5 * 2 * numel:
        pytest.skip("too little free memory on the device")
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device=device))
    param.grad = torch.ones_like(param)
    SGD([param], lr=1.0).step()
    assert (param[-32:] == -1).all()
    assert (param[:32] == -1).all()


@pytest.mark.parametrize("flatten", [False, True])
def test_parameters_need_not_be_on_the_current_device(flatten):
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two CUDA devices")
    results = []
    for device in ("cuda:0", "cuda:1"):
        params = parameters(device)
        optimizer = Adam(params, lr=0.01, max_grad_norm=0.1, flatten=flatten)
        for seed in range(3):
            give_grads(params, seed)
            optimizer.step()
        results.append([param.detach().cpu() for param in params])
        assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, *results))
