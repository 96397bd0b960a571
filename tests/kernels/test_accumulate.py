import pytest
import torch

from .tables import Row, Tables, place, spec_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_of_any_dtype_are_summed_in_fp32(device, dtype, offset):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(201, generator=generator).to(device, dtype) for _ in range(3)]
    total = place(torch.zeros(201, device=device), offset)
    for grad in grads:
        row = Row(total, place(grad, offset))
        Tables([row], device=device).set_scalars().update(spec_of("accumulate", row))
    assert torch.equal(total, grads[0].float() + grads[1].float() + grads[2].float())


def test_one_launch_adds_every_gradient_to_its_own_sum(device):
    sums = [place(torch.full((n,), float(n), device=device)) for n in (0, 1, 40, 130)]
    rows = [Row(total, place(torch.arange(len(total), device=device).float())) for total in sums]
    Tables(rows, device=device).set_scalars().update(spec_of("accumulate", rows[0]))
    for total in sums:
        assert torch.equal(total, len(total) + torch.arange(len(total), device=device).float())


def test_a_float64_sum_keeps_what_fp32_would_lose(device):
    total = place(torch.ones(3, dtype=torch.float64, device=device))
    row = Row(total, place(torch.full((3,), 2.0**-40, device=device)))
    Tables([row], device=device).set_scalars().update(spec_of("accumulate", row))
    assert total.tolist() == [1 + 2.0**-40] * 3
