"""What gradients tell the `GradScaler` of an optimizer that releases them."""

import pytest
import torch

from dragon.vm.torch.optim._gradients.reporting import ScalerReport


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
