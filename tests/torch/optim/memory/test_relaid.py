"""Parameters that are laid out anew, converted to another mode, or written to, with what is stored beside them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dragon.vm.torch.optim import SGD, Adam, AdamW

from ..support import home

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ["eager", "native"]


def convolution(dtype: torch.dtype = FP32) -> tuple[torch.nn.Parameter, Tensor]:
    """A weight in blocks of very different sizes, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, 3, 3, generator=generator).to(dtype)
    sizes = torch.logspace(-3, 2, 64)[None, :, None, None]
    return torch.nn.Parameter(weight), (torch.randn(16, 64, 3, 3, generator=generator) * sizes).to(dtype)


def relay(param: torch.nn.Parameter) -> None:
    param.data = param.data.to(memory_format=torch.channels_last)


def moments(optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    state = optimizer.state_dict()["state"][0]
    return state["exp_avg"], state["exp_avg_sq"]


def check_a_step_of_nothing(optimizer: torch.optim.Optimizer, before: tuple[Tensor, Tensor]) -> None:
    """What is left of the moments is what was there, rounded once more in other blocks."""
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.zeros_like(param)
    optimizer.step()
    for now, then, beta in zip(moments(optimizer), before, (0.9, 0.99), strict=True):
        # Blocks of one channel's neighbours: the largest of 64 channels decides about the smallest codes.
        unit = beta * then.abs().amax(1, keepdim=True) * 0.06
        assert ((now - beta * then).abs() <= 0.06 * beta * then.abs() + unit).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_that_somebody_put_beside_a_parameter_are_walked_as_they_tell(backend: str) -> None:
    param, grad = convolution()
    relay(param)
    options: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.99), "state_dtype": "8bit", "backend": backend}
    optimizer = Adam([param], native_state_dict=True, **options)
    param.grad = grad
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    codes = {key: value.contiguous() for key, value in saved.items() if key.endswith("_q8")}
    other = torch.nn.Parameter(param.detach().contiguous())
    fresh = Adam([other], **options)
    fresh.state[other].update({**saved, **codes})
    before = moments(fresh)
    assert torch.allclose(before[0], 0.1 * grad, rtol=0.1, atol=0.01)
    check_a_step_of_nothing(fresh, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_follow_a_parameter_that_is_laid_out_anew(backend: str) -> None:
    param, grad = convolution()
    optimizer = Adam([param], lr=0.0, betas=(0.9, 0.99), state_dtype="8bit", backend=backend)
    for _ in range(3):
        param.grad = grad.clone()
        optimizer.step()
    before = moments(optimizer)
    relay(param)
    assert all(map(torch.equal, moments(optimizer), before))
    assert moments(optimizer)[0].stride() == param.stride()
    check_a_step_of_nothing(optimizer, before)
    assert optimizer.state[param]["exp_avg_q8"].stride() == param.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_native_dict_says_in_which_order_its_codes_were_walked(backend: str) -> None:
    param, grad = convolution()
    relay(param)
    optimizer = Adam([param], lr=0.0, state_dtype="8bit", native_state_dict=True, backend=backend)
    param.grad = grad.contiguous(memory_format=torch.channels_last)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["storage"] == 100020301
    # As PyTorch's checkpoint functions do, which fill tensors of the loader's layout.
    for key in ("exp_avg_q8", "exp_avg_sq_q8"):
        saved["state"][0][key] = saved["state"][0][key].contiguous()
    again = Adam([param], lr=0.0, state_dtype="8bit", native_state_dict=True, backend=backend)
    again.load_state_dict(saved)
    for key, value in optimizer.state[param].items():
        assert not isinstance(value, Tensor) or torch.equal(value, again.state[param][key])
    other = torch.nn.Parameter(param.detach().contiguous())
    plain = Adam([other], lr=0.0, state_dtype=FP32, backend=backend)
    plain.load_state_dict(saved)
    exact = Adam([torch.nn.Parameter(other.detach())], lr=0.0, state_dtype="8bit", backend=backend)
    exact.load_state_dict(saved)
    reference = Adam([torch.nn.Parameter(param.detach())], state_dtype="8bit", backend=backend)
    reference.load_state_dict(saved)
    for loaded, expected in zip(moments(plain), moments(reference), strict=True):
        assert torch.equal(loaded, expected)


@pytest.mark.parametrize("number", [2, 10, 100020302, 1000203, 100020399, "x"])
def test_another_order_is_refused(number: object) -> None:
    param, grad = convolution()
    optimizer = Adam([param], state_dtype="8bit", native_state_dict=True)
    param.grad = grad
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["storage"] = number
    with pytest.raises(ValueError, match="storage for parameter 0: expected 1"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("mode", ["split16", "split8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_remainders_follow_a_parameter_that_is_laid_out_anew(mode: str, backend: str) -> None:
    param, grad = convolution(BF16)
    optimizer = AdamW([param], lr=1e-2, master_weights=mode, backend=backend)
    param.grad = grad
    optimizer.step()
    ((_, before),) = optimizer.master_weights()
    relay(param)
    ((_, after),) = optimizer.master_weights()
    assert torch.equal(before, after)
    assert torch.equal(optimizer.state_dict()["state"][0]["master_param"], before)


@pytest.mark.parametrize("mode", ["split16", "split8"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_a_weight_of_zero_is_a_master_of_zero(mode: str, backend: str) -> None:
    param = torch.nn.Parameter(torch.full((64, 64), 0.5, dtype=BF16, device=home(backend)))
    optimizer = AdamW([param], lr=1e-4, weight_decay=0.0, master_weights=mode, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (next(iter(optimizer.master_weights()))[1] < 0.5).all()
    # Not counted by PyTorch.
    param.data.zero_()
    param.data[::2] *= -1
    assert (next(iter(optimizer.master_weights()))[1] == 0).all()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.isfinite().all()


def masters(optimizer: AdamW) -> Tensor:
    ((_, master),) = optimizer.master_weights()
    return master.clone()


def trained(mode: Any, dtype: torch.dtype = BF16, **options: Any) -> tuple[torch.nn.Parameter, AdamW]:
    """With masters of all kinds, ties of both formats among them."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(256, 256, generator=generator).to(dtype))
    optimizer = AdamW([param], lr=1e-2, master_weights=mode, **options)
    for _ in range(2):
        param.grad = torch.randn(256, 256, generator=generator).to(dtype)
        optimizer.step()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    return param, optimizer


MASTERS = ["split16", "split8", FP32]
# How much of a bf16 unit a format may lose: split8 keeps 24 bits.
LOSS = {"split16": 2.0**-16, "split8": 2.0**-8, FP32: 0.0}


def assert_close(now: Tensor, then: Tensor, loss: float) -> None:
    unit = torch.exp2(then.abs().log2().floor() - 7)
    assert ((now - then).abs() <= loss * unit).all()


@pytest.mark.parametrize("first", ["weights first", "optimizer first"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("after", MASTERS)
@pytest.mark.parametrize("before", MASTERS)
def test_masters_are_loaded_into_every_mode(before: Any, after: Any, native: bool, first: str) -> None:
    param, optimizer = trained(before, native_state_dict=native)
    exact, saved = masters(optimizer), copy.deepcopy(optimizer.state_dict())
    other = torch.nn.Parameter(param.detach().clone() if first == "weights first" else torch.zeros_like(param))
    loaded = AdamW([other], lr=0.0, weight_decay=0.0, master_weights=after)
    loaded.load_state_dict(saved)
    loaded.param_groups[0].update(lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        other.copy_(param)
    other.grad = torch.zeros_like(other)
    loaded.step()
    if before == FP32 and after != FP32 and not native:
        # At a tie the weight may be the one below, of which PyTorch's form knows nothing.
        tied = (exact.view(torch.int32) & 0xFFFF) == 0x8000
        assert tied.float().mean() < 1e-3
        exact = torch.where(tied, masters(loaded), exact)
    assert_close(masters(loaded), exact, LOSS[after])


@pytest.mark.parametrize("after", MASTERS)
@pytest.mark.parametrize("before", MASTERS)
def test_masters_keep_their_values_when_the_mode_changes(before: Any, after: Any) -> None:
    param, optimizer = trained(before)
    exact = masters(optimizer)
    optimizer.param_groups[0]["master_weights"] = after
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_close(masters(optimizer), exact, LOSS[after])
    names = set(optimizer.state[param])
    assert ("param_master" in names, "param_remainder" in names) == (after == FP32, after != FP32)


def test_an_average_begins_with_the_master() -> None:
    param, optimizer = trained("split16")
    exact = masters(optimizer)
    optimizer.param_groups[0]["ema_decay"] = 0.9
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["ema"], exact, rtol=2e-7, atol=0)


def test_masters_are_not_made_of_averages() -> None:
    _, optimizer = trained(FP32, ema_decay=0.9)
    exact = masters(optimizer)
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="averages would become masters"):
        optimizer.resync_master()
    assert torch.equal(masters(optimizer), exact)


def test_flat_buffers_are_counted_as_they_are_allocated() -> None:
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(10)]
    optimizer = Adam(params, flatten=True)
    for param in params:
        param.grad = torch.ones(5)
    optimizer.step()
    optimizer.zero_grad()
    # Each starts at a multiple of 16 elements.
    expected = {"parameters": 640, "gradients": 640, "states": 1280, "counters": 40}
    assert {kind: n for kind, n in optimizer.memory().items() if n} == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_rounded_to_narrower_parameters(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(64, dtype=BF16))
    param.grad_dtype = None
    optimizer = SGD([param], lr=1.0, momentum=0.5, state_dtype=FP32, backend=backend)
    plain = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    plain.grad_dtype = None
    sgd = SGD([plain], lr=1.0, backend=backend)
    # Rounded to bf16 it would be 1.
    value = torch.full((64,), 1 + 2.0**-9)
    param.grad, plain.grad = value, value.clone()
    optimizer.step()
    sgd.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], value)
    assert (plain == -(2.0**-9)).all()


@pytest.mark.parametrize("number", [1, 1.0, True, torch.tensor(1)], ids=str)
def test_codes_that_were_walked_as_they_lie_are_loaded_into_another_layout(number: object) -> None:
    param, grad = convolution()
    optimizer = Adam([param], lr=0.0, state_dtype="8bit", native_state_dict=True)
    param.grad = grad
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["storage"] = number
    # As PyTorch's checkpoint functions do, which fill tensors of the loader's layout.
    for key in ("exp_avg_q8", "exp_avg_sq_q8"):
        saved["state"][0][key] = saved["state"][0][key].contiguous(memory_format=torch.channels_last)
    other = torch.nn.Parameter(param.detach().contiguous(memory_format=torch.channels_last))
    loaded = Adam([other], lr=0.0, state_dtype=FP32)
    loaded.load_state_dict(saved)
    param.grad = None
    expected = Adam([param], state_dtype=FP32)
    expected.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, moments(loaded), moments(expected)))


def test_codes_of_many_dimensions_are_loaded_back() -> None:
    weight = torch.randn(4, *(2,) * 10, 16).transpose(1, 11).contiguous().transpose(1, 11)
    param = torch.nn.Parameter(weight)
    optimizer = Adam([param], state_dtype="8bit", native_state_dict=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    again = Adam([param], state_dtype="8bit", native_state_dict=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[param].items():
        assert not isinstance(value, Tensor) or torch.equal(value, again.state[param][key])


@pytest.mark.parametrize("mode", ["split16", "split8"])
def test_a_remainder_belongs_to_bf16_alone(mode: str) -> None:
    param, optimizer = trained(mode)
    saved = copy.deepcopy(optimizer.state_dict())
    weight = param.detach().float()
    param.data = param.data.half()
    optimizer.param_groups[0]["master_weights"] = FP32
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach().float(), weight, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(masters(optimizer), weight, rtol=1e-3, atol=1e-6)
    native = AdamW([torch.nn.Parameter(weight.to(BF16))], master_weights=mode, native_state_dict=True)
    native.load_state_dict(saved)
    other = torch.nn.Parameter(weight.half())
    loaded = AdamW([other], lr=0.0, master_weights=FP32, ema_decay=0.9)
    loaded.load_state_dict(native.state_dict())
    loaded.param_groups[0].update(lr=0.0, weight_decay=0.0)
    other.grad = torch.zeros_like(other)
    loaded.step()
    torch.testing.assert_close(loaded.state[other]["ema"], weight, rtol=1e-3, atol=1e-6)


def test_an_average_begins_with_weights_that_were_written_since_the_last_step() -> None:
    param, optimizer = trained(FP32)
    with torch.no_grad():
        param.fill_(5.0)
    optimizer.param_groups[0]["ema_decay"] = 0.99
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (optimizer.state[param]["ema"] == 5.0).all()


@pytest.mark.parametrize("master", [FP32, "split16"])
def test_a_momentum_buffer_beside_a_master_begins_anew(master: Any) -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=BF16))
    optimizer = SGD([param], lr=0.1, momentum=0.9, dampening=0.5, master_weights=master)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    optimizer.state[param]["momentum_buffer"] = None
    optimizer.state[param]["mine"] = None
    optimizer.step()
    assert (optimizer.state[param]["momentum_buffer"] == 1).all()
    assert optimizer.state[param]["mine"] is None


def test_a_master_that_its_weight_does_not_stand_for_is_left_at_the_weight() -> None:
    param, optimizer = trained(FP32)
    # Not counted by PyTorch.
    param.data.fill_(100.0)
    optimizer.param_groups[0]["master_weights"] = "split16"
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (masters(optimizer) == 100).all()


@pytest.mark.parametrize("after", ["split16", "split8"])
def test_a_master_halfway_between_weights_stays_there(after: str) -> None:
    param, optimizer = trained(FP32)
    halfway = 1 + 2.0**-8
    with torch.no_grad():
        optimizer.state[param]["param_master"].fill_(halfway)
        # To even, which is down.
        param.data.fill_(halfway)
    assert (param == 1).all()
    optimizer.param_groups[0]["master_weights"] = after
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_close(masters(optimizer), torch.full_like(masters(optimizer), halfway), LOSS[after])
