"""Devices whose tensors have no addresses, or no fp64: Apple's GPUs, and what a compiler runs, as XLA does.

PyTorch's lazy tensors on the CPU are such a device on any machine.
"""

import copy
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._lazy import ts_backend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dragon.vm.torch.optim import SGD, Adam, AdamW
from dragon.vm.torch.optim import _devices as devices
from dragon.vm.torch.optim._formats import bits
from dragon.vm.torch.optim._groups import checks, eligibility, layout, states

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["lazy", *["mps"] * torch.backends.mps.is_available()])
def device(request):
    if request.param == "lazy":
        ts_backend.init()
    return torch.device(request.param)


def trained(make, device, mode=nullcontext):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device)
    optimizer = make(model.parameters())
    inputs = torch.randn(16, 64).to(device)
    for _ in range(4):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        with mode():
            optimizer.step()
    return model, optimizer


def values_of(model):
    return [param.detach().cpu() for param in model.parameters()]


def assert_close(model, other):
    for own, its in zip(values_of(model), values_of(other), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-5, atol=1e-6)


class WithoutFloat64(TorchDispatchMode):
    """Fails where a device is asked for fp64, and where its tensors are to become fp64 on the way to the CPU."""

    def __init__(self, device):
        super().__init__()
        self._type = device.type

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs, result = tree_leaves((args, kwargs or {})), func(*args, **(kwargs or {}))
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        is_from_device = any(tensor.device.type == self._type for tensor in tensors)
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                assert made.device.type != self._type, f"{func}: the device has no fp64"
                assert not is_from_device, f"{func}: the device makes no fp64 for the CPU"
        return result


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (Adam, {}),
        (Adam, {"amsgrad": True}),
        (Adam, {"capturable": True}),
        (Adam, {"fused": True}),
        (AdamW, {"weight_decay": 0.1}),
        (SGD, {"momentum": 0.9, "dampening": 0.1}),
    ],
    ids=str,
)
def test_training_is_pytorchs(ours, options, device):
    model, optimizer = trained(lambda params: ours(params, lr=0.01, **options), device)
    theirs = getattr(torch.optim, ours.__name__)
    # PyTorch itself refuses these on some devices.
    plain = {key: value for key, value in options.items() if key not in ("capturable", "fused")}
    assert_close(model, trained(lambda params: theirs(params, lr=0.01, **plain), device)[0])
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {moment.device.type for moment in moments} == {device.type}


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.1, "norm_type": math.inf},
        {"clip_norm": 0.1},
        {"clip_value": 0.01},
        {"skip_nonfinite": True},
        {"ema_decay": 0.9},
        {"release_gradients": True},
    ],
    ids=str,
)
def test_own_options_do_as_on_the_cpu(options, device):
    results = [trained(lambda params: AdamW(params, lr=0.01, **options), each) for each in (device, CPU)]
    (model, optimizer), (other, expected) = results
    assert_close(model, other)
    if expected.grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm.cpu(), expected.grad_norm, rtol=1e-5, atol=0)
    if "ema_decay" in options:
        with optimizer.swap_ema(), expected.swap_ema():
            assert_close(model, other)


def test_norms_of_float64_gradients_stay_so_where_a_device_has_them(device):
    if device.type == "mps":
        pytest.skip("it has no fp64 tensors")
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64).to(device))
    optimizer = SGD([param], lr=1.0, max_grad_norm=1.0)
    param.grad = torch.full((4,), 1e30, dtype=torch.float64).to(device)
    optimizer.step()
    assert float(optimizer.grad_norm) == 2e30
    torch.testing.assert_close(
        param.detach().cpu(), torch.full((4,), -0.5, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_sums_checkpoints_and_steps_without_gradients_do_as_on_the_cpu(device):
    results = []
    for each in (device, CPU):
        model, optimizer = trained(lambda params: Adam(params, lr=0.01, max_grad_norm=1.0), each)
        for _ in range(2):
            model(torch.ones(2, 64).to(each)).sum().backward()
            optimizer.sum_grad()
        optimizer.step()
        state = optimizer.state_dict()
        # A dict from the CPU too, as `torch.load(map_location="cpu")` gives it.
        for saved in (state, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, state)):
            other = copy.deepcopy(model)
            fresh = Adam(other.parameters(), max_grad_norm=1.0)
            fresh.load_state_dict(saved)
            fresh.zero_grad()
            fresh.step()
            assert float(fresh.grad_norm) == 0
            other(torch.ones(2, 64).to(each)).sum().backward()
            fresh.step()
        results.append((other, model))
    for own, its in zip(*results, strict=True):
        assert_close(own, its)


def test_a_tensor_without_an_address_shares_no_memory(device):
    params = [torch.nn.Parameter(torch.zeros(256).to(device)) for _ in range(3)]
    assert layout.overlapping_pair(list(filter(checks.has_memory, params))) is None
    assert checks.has_memory(torch.nn.Parameter(torch.zeros(0).to(device)))
    assert not any(map(checks.is_freed, params))
    Adam(params)
    # Under a dispatch mode, lazy tensors have no storage either.
    with WithoutFloat64(device):
        params = [torch.nn.Parameter(torch.ones(256).to(device)) for _ in range(2)]
        optimizer = SGD(params, lr=0.5)
        for param in params:
            param.grad = torch.ones(256).to(device)
        optimizer.step()
    assert all(param.cpu().eq(0.5).all() for param in params)


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0.1}, {"max_grad_norm": 0.1, "norm_type": math.inf}, {"clip_norm": 0.1}], ids=str
)
def test_no_step_asks_a_device_for_float64_that_has_none(options, device):
    without_float64 = partial(WithoutFloat64, device)
    model, optimizer = trained(lambda params: Adam(params, lr=0.01, **options), device, without_float64)
    assert_close(model, trained(lambda params: Adam(params, lr=0.01, **options), CPU)[0])
    # A first step without gradients, and a root.
    optimizer = Adam([torch.nn.Parameter(torch.ones(2).to(device))], **options)
    number = torch.arange(9.0).to(device)
    with without_float64():
        optimizer.step()
        root = bits.square_root(number)
    torch.testing.assert_close(root.cpu(), torch.arange(9.0).sqrt())


def test_the_emulation_of_a_device_without_float64_fails_where_one_is_asked(device):
    with WithoutFloat64(device), pytest.raises(AssertionError, match="no fp64"):
        torch.ones(2).to(device).double()
    with WithoutFloat64(device), pytest.raises(AssertionError, match="no fp64"):
        torch.ones(2).to(device).to("cpu", torch.float64)


def test_where_pointers_are_handles_storages_tell_what_overlaps(monkeypatch):
    base = torch.zeros(12)
    # Storages whose handles are closer to each other than their lengths.
    pieces = [torch.nn.Parameter(states.in_own_storage(base[i : i + 8])) for i in (0, 4)]
    views = [base[:8], base[4:]]
    assert layout.overlapping_pair(pieces) == layout.overlapping_pair(views) == (0, 1)
    monkeypatch.setattr(layout, "has_addresses", lambda device: False)
    assert layout.overlapping_pair(pieces) is None
    assert layout.overlapping_pair(views) == (0, 1)
    assert layout.overlapping_pair([base[:4], base[4:]]) is None
    with pytest.raises(ValueError, match="parameter 0 and parameter 1 do"):
        Adam([torch.nn.Parameter(view) for view in views])
    Adam(pieces)


@pytest.mark.parametrize("has_addresses", [True, False])
def test_an_empty_storage_was_freed_only_where_tensors_have_addresses(has_addresses, monkeypatch):
    # Devices that are written in Python keep numbers elsewhere than in storages.
    monkeypatch.setattr(checks, "has_addresses", lambda device: has_addresses)
    param = torch.nn.Parameter(torch.zeros(3))
    assert checks.has_memory(param)
    assert not checks.is_freed(param)
    param.untyped_storage().resize_(0)
    assert checks.has_memory(param) == checks.is_freed(param) == has_addresses


def test_step_counts_share_a_buffer_only_where_tensors_have_addresses(monkeypatch):
    place = states.CounterPlace(CPU)
    assert states.counter_buffer(states.step_counters([1.0, 2.0], place)) is not None
    monkeypatch.setattr(states, "has_addresses", lambda device: False)
    counters = states.step_counters([1.0, 2.0], place)
    assert [float(counter) for counter in counters] == [1.0, 2.0]
    assert states.counter_buffer(counters) is None


@pytest.mark.parametrize("has_fp64", [False, True])
def test_kernels_need_a_device_with_float64(has_fp64, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    devices.has_float64.cache_clear()
    try:
        reason = eligibility.why_not("triton", torch.device("xpu", 0))
    finally:
        devices.has_float64.cache_clear()
    assert (reason is None) == has_fp64 or "triton is not installed" in reason
    assert has_fp64 or "fp64" in reason


@pytest.fixture
def gpu_without_triton(monkeypatch):
    """The CPU as a GPU for which triton is not installed."""
    monkeypatch.setattr(eligibility, "_TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(eligibility, "why_no_kernels", lambda: "triton is not installed")


@pytest.mark.usefixtures("gpu_without_triton")
def test_a_gpu_without_kernels_is_told_of_once_where_they_were_expected():
    def param():
        return torch.nn.Parameter(torch.zeros(3))

    with pytest.warns(UserWarning, match="parameters on cpu .* far slower .*: triton is not installed") as caught:
        optimizer = Adam([{"params": [param()]}, {"params": [param()]}])
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    optimizer.add_param_group({"params": [param()]})
    Adam([param()], backend="eager")
    Adam([param()], differentiable=True)
    Adam([param().requires_grad_(False)])


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_fake_tensor_of_a_gpu_that_is_not_there_is_taken_without_a_word(kind, monkeypatch):
    monkeypatch.setattr(eligibility, "why_no_kernels", lambda: "triton is not installed")
    for _ in range(2):
        with FakeTensorMode():
            optimizer = Adam([torch.nn.Parameter(torch.zeros(3, device=kind))])
        assert optimizer.param_groups[0]["params"][0].device.type == kind
        monkeypatch.setattr(eligibility, "why_no_kernels", lambda: None)
