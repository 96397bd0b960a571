"""What gradients tell a `GradScaler`."""

import math

import pytest
import torch

from dragon.vm.torch.optim import SGD, _release
from dragon.vm.torch.optim._gradients.reporting import ScalerReport, nonfinite, report, stand_in


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_scale_and_finding_are_fp32_under_any_default_dtype(default):
    """A scale of 2**17 is infinite in fp16; kernels read fp32."""
    report = ScalerReport(torch.amp.GradScaler("cpu", init_scale=2.0**17))
    torch.set_default_dtype(default)
    try:
        found_inf = report.found_inf([torch.ones(3)], torch.device("cpu"))
        scaling = report.scaling(found_inf)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scaling.found_inf.dtype == scaling.grad_scale.dtype == torch.float32
    assert float(scaling.grad_scale) == 2.0**17


def param(values, grad=None):
    """A parameter with a gradient; integers cannot be trained."""
    made = torch.nn.Parameter(values, requires_grad=values.is_floating_point() or values.is_complex())
    made.grad = grad
    return made


def test_empty_and_sparse_gradients_are_finite():
    grads = [torch.ones(0), torch.ones(2).to_sparse(), torch.ones(2)]
    assert nonfinite(grads, torch.device("cpu")).tolist() == [0.0]
    assert nonfinite([*grads, torch.tensor([math.nan])], torch.device("cpu")).tolist() == [1.0]


def test_the_first_gradient_that_can_be_infinite_tells_what_was_found():
    dumb = [param(torch.ones(0), torch.ones(0)), param(torch.ones(2), torch.ones(2).to_sparse())]
    dumb.append(param(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)))
    found = [torch.ones(1)]
    assert not report(dumb, found)
    able = param(torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.complex64))
    assert report([*dumb, able], found)
    assert torch.isinf(able.grad).flatten().tolist() == [True, False, False, False]


def test_a_gradient_of_inference_mode_tells_too():
    with torch.inference_mode():
        grad = torch.ones(2)
    for found, told in ((0.0, [1.0, 1.0]), (1.0, [math.inf, 1.0])):
        assert report([param(torch.ones(2), grad)], [torch.tensor(found)])
        assert grad.tolist() == told


def test_the_smallest_trained_parameter_stands_in():
    frozen = param(torch.ones(1)).requires_grad_(False)
    params = [param(torch.ones(0)), frozen, param(torch.ones(3)), param(torch.ones(2)), param(torch.ones(4))]
    assert stand_in(params) is params[3]
    assert params[3].grad.tolist() == [0.0, 0.0]
    assert stand_in(params) is None
    assert stand_in([params[0], frozen]) is frozen
    assert stand_in([params[0]]) is None


def test_a_gradient_that_only_a_scaler_finds_goes_with_the_step_that_failed(monkeypatch):
    monkeypatch.setattr(_release, "BUCKET_BYTES", 1)
    scaler = torch.amp.GradScaler("cpu")
    unused, used = (torch.nn.Parameter(torch.zeros(n)) for n in (1, 2))
    optimizer = SGD([unused, used], lr=1.0, release_gradients=scaler)
    scaler.scale(used.sum()).backward()

    def fail(*_):
        raise KeyError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError):
        scaler.step(optimizer)
    handle.remove()
    assert unused.grad is not None
    optimizer.zero_grad()
    unused.grad = torch.ones(1)
    optimizer.step()
    # The scale of the step that failed is there still.
    assert unused.item() == -1 / scaler.get_scale()
