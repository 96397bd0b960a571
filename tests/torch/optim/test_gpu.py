"""What only a device can show of a step: waiting, uploads, norms of many elements, sizes past int32."""

import math

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._step import PreparedStep
from dragon.vm.torch.optim._watch import HeaderGradWatch, HeaderWatch

pytestmark = pytest.mark.gpu


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (17,), (), (0,), (70001,), (64, 33)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def members(optimizer):
    return [m for step in optimizer._prepared.latest() for device in step._launched for m in device.members]


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
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (0.1, 0.2, 0.2):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.sum_grad()
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.n_skipped_steps == 0


def test_unchanged_steps_upload_nothing_and_changed_ones_upload_once(device):
    params = parameters(device)
    optimizer = Adam(params)
    give_grads(params, 0)
    optimizer.step()
    before = members(optimizer)[0].n_uploads
    optimizer.step()
    assert members(optimizer)[0].n_uploads == before
    optimizer.param_groups[0]["lr"] = 0.5
    give_grads(params, 1)
    optimizer.step()
    assert members(optimizer)[0].n_uploads == before + 1


def test_headers_of_the_devices_tensors_are_read_and_fresh_gradients_need_no_new_plan(device, monkeypatch):
    params = parameters(device)
    optimizer = Adam(params)
    give_grads(params, 0)
    optimizer.step()
    (step,) = optimizer._prepared.latest()
    premises = step._premises
    assert (type(premises._watch), type(premises._grad_watch)) == (HeaderWatch, HeaderGradWatch)
    monkeypatch.setattr(PreparedStep, "__init__", lambda *_: pytest.fail("a step was prepared"))
    for seed in range(1, 20):
        optimizer.zero_grad(set_to_none=True)
        # Blocks that the gradients do not get, so that they move.
        kept = [torch.zeros_like(param) for param in params[: seed % 4]]
        give_grads(params, seed)
        found = Gradients(lambda: [param.grad for param in params], are_own=True)
        assert premises._watch.is_unchanged()
        assert premises._grad_watch.find(found)
        assert found.addresses.tolist() == [param.grad.data_ptr() for param in params]
        versions = [param._version for param in params]
        optimizer.step()
        assert all(param._version > version for param, version in zip(params, versions, strict=True))
        del kept
    params[1].data = params[1].data.clone()
    assert not premises._watch.is_unchanged()


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
