"""What a step leaves in `.grad`: with a `GradScaler` what PyTorch's fused step leaves, else what was there."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dragon.kernels import launch
from dragon.vm.torch import optim as ours
from dragon.vm.torch.optim._gradients.unscaling import unscale_all

from ..support import BACKENDS, bits, everything, home, numbers, parameters, patient

each_backend = pytest.mark.parametrize("backend", BACKENDS)

SHAPES = ((33,), (33,), (4, 6), (0,), ())
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """A run of two steps: tensors, how they lie in memory, options, and what a scaler hands over."""

    name: str
    dtype: torch.dtype
    layouts: tuple[str, ...]
    scale: float
    found: tuple[float, float]
    options: dict[str, Any] = field(default_factory=dict)
    sums: bool = False
    zero_grad: bool = False


# Each with a dtype of the parameters.
MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (FP32, {"state_dtype": BF16}),
    (FP32, {"state_dtype": "8bit"}),
    (BF16, {"stochastic_rounding": True}),
    (BF16, {"master_weights": "split16"}),
    (BF16, {"master_weights": "split8", "state_dtype": "8bit"}),
    (FP16, {"master_weights": FP32}),
]
LIMITS: list[dict[str, Any]] = [
    {}, {}, {"max_grad_norm": 0.5}, {"clip_norm": 0.5}, {"clip_value": 0.5}, {"grad_scale": 0.3},
    {"max_grad_norm": 0.5, "skip_nonfinite": True, "grad_scale": 2.0},
]  # fmt: skip
FLAGS = [{}, {"amsgrad": True}, {"maximize": True}, {"ema_decay": 0.9}, {"flatten": True}, {"epsilon_hat": True}]
LAYOUTS = ["plain", "plain", "transposed", "expanded", "shared", "strided", "wide"]


def _options(name: str, flags: dict[str, Any], limit: dict[str, Any]) -> dict[str, Any]:
    if name == "SGD":
        flags = {key: value for key, value in flags.items() if key not in ("amsgrad", "epsilon_hat")}
    if "clip_norm" in limit:
        flags.pop("flatten", None)
    return {**flags, **limit}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(["Adam", "AdamW", "SGD"]))
    dtype = draw(st.sampled_from([FP32, FP32, BF16, FP16, FP64, torch.complex64]))
    options = _options(name, draw(st.sampled_from(FLAGS)), draw(st.sampled_from(LIMITS)))
    if name != "SGD" and draw(st.booleans()):
        dtype, mode = draw(st.sampled_from(MODES))
        options |= mode
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in SHAPES]
    scale = draw(st.sampled_from([2.0**16, 2.0**10, 1.0, 3.0, 0.7]))
    found = (draw(st.sampled_from([0.0, 0.0, 1.0])), 0.0)
    sums = draw(st.sampled_from([False, False, True]))
    zero_grad = draw(st.sampled_from([False, False, False, True]))
    return Case(name, dtype, tuple(layouts), scale, found, options, sums, zero_grad)


def make_param(case: Case, index: int, device: str) -> torch.nn.Parameter:
    """A parameter; a strided one lies in every other element of its memory."""
    value = numbers(index, *SHAPES[index], dtype=case.dtype, device=device)
    if case.layouts[index] == "strided" and "flatten" not in case.options and not is_narrow(case):
        value = torch.stack([value, value], dim=-1)[..., 0]
    param = torch.nn.Parameter(value)
    if case.layouts[index] == "wide":
        param.grad_dtype = None
    return param


def is_narrow(case: Case) -> bool:
    return any(key in case.options for key in ("state_dtype", "stochastic_rounding", "master_weights"))


def give_gradients(case: Case, params: list[torch.nn.Parameter], seed: int) -> None:
    """Gradients of a scaled loss, each in its layout."""
    for index, (param, layout) in enumerate(zip(params, case.layouts, strict=True)):
        # Finite in half precision.
        grad = numbers(seed + index, *param.shape, dtype=param.dtype, device=str(param.device)) * (case.scale / 64)
        if layout == "transposed":
            grad = grad.t().contiguous().t() if grad.dim() > 1 else grad
        elif layout == "expanded" and grad.numel():
            grad = grad.flatten()[:1].sum().expand(grad.shape)
        elif layout == "shared" and index == 1 and params[0].grad.dtype == grad.dtype:
            grad = params[0].grad.view(grad.shape)
        elif layout == "wide" and not grad.is_complex():
            grad = grad.to(FP64 if grad.dtype == FP64 else FP32)
        param.grad = grad


def left_by_torch(case: Case, grads: list[Tensor], found: float) -> list[Tensor]:
    """What PyTorch's fused step leaves of gradients, each in memory of its own."""
    left = []
    for grad in grads:
        whole = torch.view_as_real(grad) if grad.is_complex() else grad
        param = torch.nn.Parameter(torch.zeros_like(whole, memory_format=torch.contiguous_format))
        param.grad = whole.clone(memory_format=torch.contiguous_format)
        options = {} if case.name == "SGD" else {"amsgrad": case.options.get("amsgrad", False)}
        optimizer = getattr(torch.optim, case.name)([param], lr=0.01, fused=True, **options)
        optimizer.grad_scale = torch.tensor(case.scale, device=grad.device)
        optimizer.found_inf = torch.tensor(found, device=grad.device)
        optimizer.step()
        left.append(torch.view_as_complex(param.grad) if grad.is_complex() else param.grad)
    return left


@each_backend
@patient
@pytest.mark.filterwarnings("ignore:.*rounded to nearest")
@given(case=cases())
def test_gradients_after_a_scaled_step_are_pytorchs(backend: str, case: Case) -> None:
    device = home(backend)
    params = [make_param(case, index, device) for index in range(len(SHAPES))]
    optimizer = getattr(ours, case.name)(params, lr=0.01, fused=True, backend=backend, **case.options)
    for number, found in enumerate(case.found):
        if case.sums:
            give_gradients(case, params, 50 + 100 * number)
            optimizer.sum_grad()
        give_gradients(case, params, 100 * number)
        grads = [param.grad for param in params]
        expected = left_by_torch(case, grads, found)
        optimizer.grad_scale = torch.tensor([case.scale], device=device)
        optimizer.found_inf = torch.tensor([found], device=device)
        optimizer.step(zero_grad=case.zero_grad)
        for param, grad, left in zip(params, grads, expected, strict=True):
            assert param.grad is grad
            assert param.grad.dtype == left.dtype
            assert bits(param.grad) == bits(torch.zeros_like(left) if case.zero_grad else left)


LIMITED = [{"max_grad_norm": 0.1}, {"clip_norm": 0.1}, {"clip_value": 0.1}, {"grad_scale": 0.3}]


@each_backend
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64, torch.complex64])
@pytest.mark.parametrize("options", LIMITED)
@pytest.mark.parametrize("name", ["Adam", "SGD"])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_without_a_scaler_gradients_stay_as_they_are(
    backend: str, dtype: torch.dtype, options: dict[str, Any], name: str, zero_grad: bool
) -> None:
    params = parameters([(5,), (3, 4), (9000,)], dtype, home(backend))
    optimizer = getattr(ours, name)(params, lr=0.1, backend=backend, **options)
    for param in params:
        param.grad = numbers(1, *param.shape, dtype=dtype, device=home(backend))
    grads = [torch.zeros_like(param) if zero_grad else param.grad.clone() for param in params]
    optimizer.step(zero_grad=zero_grad)
    assert [bits(param.grad) for param in params] == [bits(grad) for grad in grads]


@each_backend
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64, torch.complex64])
@pytest.mark.parametrize("options", LIMITED)
def test_a_limited_step_leaves_gradients_divided_by_the_scale(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    params = parameters([(5,), (3, 4), (9000,)], dtype, home(backend))
    optimizer = ours.Adam(params, lr=0.1, backend=backend, fused=True, **options)
    for param in params:
        param.grad = numbers(1, *param.shape, dtype=dtype, device=home(backend))
    grads = [param.grad.clone() for param in params]
    # Infinite in float16, and between two numbers of bfloat16.
    scale = 2.0**16 + 2.0**8
    optimizer.grad_scale = torch.tensor(scale, device=home(backend))
    optimizer.step()
    for param, grad in zip(params, grads, strict=True):
        is_half = dtype.itemsize == 2
        expected = (grad.float() / scale).to(dtype) if is_half else grad.div(scale)
        assert torch.allclose(param.grad, expected, rtol=0 if is_half else 1e-6, atol=0)


@each_backend
def test_autograd_knows_that_gradients_were_unscaled(backend: str) -> None:
    (param,) = parameters([(5,)], device=home(backend))
    optimizer = ours.Adam([param], backend=backend, fused=True)
    param.grad = torch.ones_like(param)
    optimizer.grad_scale = torch.tensor(2.0, device=home(backend))
    version = param.grad._version
    optimizer.step()
    assert param.grad._version > version


@each_backend
def test_a_norm_beyond_all_bounds_leaves_gradients_scaled(backend: str) -> None:
    """The step is skipped, as one is that the scaler skips."""
    params = parameters([(5,), (3, 4)], device=home(backend))
    optimizer = ours.Adam(params, backend=backend, fused=True, skip_nonfinite=True)
    for param in params:
        param.grad = torch.full_like(param, math.inf)
        param.grad.view(-1)[0] = 4.0
    optimizer.grad_scale = torch.tensor(2.0, device=home(backend))
    optimizer.step()
    assert [float(param.grad.view(-1)[0]) for param in params] == [4.0, 4.0]


@each_backend
def test_a_clipped_step_leaves_gradients_without_the_scale_alone(backend: str) -> None:
    params = [torch.nn.Parameter(numbers(i, 40, device=home(backend))) for i in range(3)]
    optimizer = ours.Adam(params, fused=True, backend=backend, max_grad_norm=0.5)
    optimizer.grad_scale = torch.full((1,), 8.0, device=home(backend))
    grads = [numbers(9 + i, 40, device=home(backend)) for i in range(3)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = 8 * grad
    optimizer.step()
    assert [bits(param.grad) for param in params] == list(map(bits, grads))


@each_backend
def test_gradients_are_divided_by_each_scale_also_where_clipping_makes_up_for_it(backend: str) -> None:
    """Whatever the scale, these gradients are multiplied by the same factor."""
    (param,) = parameters([(1,)], device=home(backend))
    optimizer = ours.SGD([param], lr=0.1, fused=True, backend=backend, max_grad_norm=1.0)
    for scale in (2.0, 4.0, 2.0):
        param.grad = torch.full_like(param, 2.0**60)
        optimizer.grad_scale = torch.full((1,), scale, device=home(backend))
        optimizer.step()
        assert float(param.grad) == 2.0**60 / scale


@pytest.mark.parametrize("divisor", [65536.0, 2.0**40, 2.0**-30, 3.0, 0.1, 1 / 3, 1e30, 1e-40])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_number_of_half_precision_is_divided_in_float32_and_rounded_once(
    dtype: torch.dtype, divisor: float
) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    expected = (every.float() / divisor).to(dtype)
    for scale in (divisor, torch.tensor(divisor), torch.tensor([divisor])):
        for found in (every.clone(), every.repeat_interleave(2)[::2]):
            unscale_all([found], scale)
            wrong = found.isnan() != expected.isnan()
            assert not wrong.any()
            assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])


@each_backend
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(FP32, BF16), (BF16, FP32), (FP16, FP32)])
def test_gradients_of_another_dtype_are_left_divided_by_the_scale_and_rounded_once(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    params = parameters([(5,), (9000,)], dtype, home(backend))
    optimizer = ours.Adam(params, lr=0.1, backend=backend, fused=True)
    for param in params:
        param.grad_dtype = None
        param.grad = numbers(1, *param.shape, dtype=grad_dtype, device=home(backend))
    expected = [(param.grad.float() / 8).to(grad_dtype) for param in params]
    optimizer.grad_scale = torch.tensor(8.0, device=home(backend))
    optimizer.step()
    assert [bits(param.grad) for param in params] == list(map(bits, expected))


@each_backend
def test_a_scale_of_zero_leaves_what_pytorch_leaves(backend: str) -> None:
    results = []
    for kind, options in ((torch.optim.Adam, {}), (ours.Adam, {"backend": backend})):
        params = parameters([(3,), (9000,)], device=home(backend))
        optimizer = kind(params, fused=True, **options)
        for param in params:
            param.grad = numbers(1, *param.shape, device=home(backend))
            param.grad[0] = 0.0
        optimizer.grad_scale = torch.zeros((), device=home(backend))
        optimizer.step()
        results.append([*params, *(param.grad for param in params)])
    for theirs, own in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_a_negated_gradient_is_divided_in_its_own_precision(dtype):
    values = numbers(0, 100, dtype=dtype)
    view = negated(values)
    unscale_all([view], 3.0)
    assert torch.equal(view, values / 3.0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("scale", [3.0, torch.full((1,), 7.0)], ids=["number", "tensor"])
def test_a_conjugated_gradient_is_divided_as_one_that_is_not(dtype, scale):
    values = numbers(0, 100, dtype=dtype)
    plain = values.clone()
    unscale_all([values.conj()], scale)
    unscale_all([plain], scale)
    assert torch.equal(values, plain)


def negated(values: Tensor) -> Tensor:
    """The same values, which are negated where they are read."""
    return torch.complex(values, -values).conj().imag


def of_inference(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


@each_backend
@pytest.mark.parametrize("made", [negated, of_inference, lambda values: of_inference(values.t()).t()])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"state_dtype": BF16}], ids=str)
@pytest.mark.parametrize("sums", [False, True])
def test_a_gradient_that_few_operations_may_write_is_divided_too(backend, made, options, sums):
    device = home(backend)
    results = []
    for make in (torch.clone, made):
        params = [torch.nn.Parameter(torch.ones(3, 4, device=device)) for _ in range(2)]
        optimizer = ours.Adam(params, backend=backend, **options)
        for turn in range(1 + sums):
            if turn:
                optimizer.sum_grad()
            params[0].grad = make(numbers(turn, 12).reshape(3, 4).to(device))
            params[1].grad = numbers(2, 12).reshape(3, 4).to(device)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([4.0, 0.0], device=device)
        optimizer.step()
        results.append([everything(optimizer), *(param.grad.tolist() for param in params)])
    assert results[0] == results[1]


def test_expanded_gradients_of_no_or_two_elements_and_a_sparse_one_are_divided_once():
    sparse, pair = torch.tensor([0.0, 6.0]).to_sparse(), torch.tensor(6.0).expand(2)
    unscale_all([torch.ones(()).expand(0), pair, sparse], 2.0)
    assert pair.tolist() == [3.0, 3.0]
    assert sparse.to_dense().tolist() == [0.0, 3.0]


def test_an_interrupt_while_the_kernel_that_unscales_is_compiled_counts_no_step(monkeypatch):
    def interrupted(*args, **named):
        raise KeyboardInterrupt

    (param,) = parameters([(3,)], device=home("triton"))
    optimizer = ours.Adam([param], backend="triton")
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = everything(optimizer)
    one = torch.ones(1, device=param.device)
    optimizer.grad_scale, optimizer.found_inf = 2 * one, 0 * one
    monkeypatch.setattr(launch.update_kernel, "warmup", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert everything(optimizer) == before
