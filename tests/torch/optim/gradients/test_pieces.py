"""Gradients that a native step copies are copied piece by piece: the bits stay, and so do the gradients."""

from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._backends import fused_calls, pieces

from ..support import bits, numbers

SHAPES = [(1000,), (70, 33), (64,), (5, 7)]
OPTIONS: list[dict[str, Any]] = [
    {"clip_value": 0.5},
    {"max_grad_norm": 0.1},
    {"clip_norm": 0.1},
    {"grad_scale": 0.25},
    {"max_grad_norm": 0.1, "grad_scale": 2.0},
]


def stepped(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
    """Parameters and states after three steps whose gradients stayed as they were."""
    params = [torch.nn.Parameter(numbers(i, *shape, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    # No row of memory, and not contiguous.
    params.insert(1, torch.nn.Parameter(numbers(9, 40, 30, dtype=dtype).t()))
    optimizer = kind(params, lr=0.1, backend="native", **options)
    for step in range(3):
        grads = [numbers(step, *param.shape, dtype=dtype) for param in params]
        # The first one misses a step: its count is another.
        present = list(zip(params, grads, strict=True))[step == 1 :]
        for param, grad in present:
            # In the layout of the parameter: another one would be copied before the step.
            param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()
        assert all(torch.equal(param.grad, grad) for param, grad in present)
        optimizer.zero_grad(set_to_none=True)
    return [*params, *(state for entries in optimizer.state.values() for state in entries.values())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("kind", [Adam, SGD])
def test_pieces_change_no_bit(
    kind: Any, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype.is_complex and "clip_value" in options:
        pytest.skip("there is no order of complex numbers")
    # Each of these is small, and the first piece holds them all.
    whole = stepped(kind, dtype, options)
    cuts: list[list[int]] = []
    plain = fused_calls.FusedCall.limited

    def counting(call: Any, grads: list[torch.Tensor], copies: list[torch.Tensor]) -> list[torch.Tensor]:
        cuts.append([grad.numel() for grad in grads])
        return plain(call, grads, copies)

    monkeypatch.setattr(fused_calls.FusedCall, "limited", counting)
    numel_of_pair = 2 if dtype.is_complex else 1
    # Three pieces: 1000 and 1200 elements, 2310, and the others.
    monkeypatch.setattr(pieces, "SMALL_PIECE", 2310 * numel_of_pair)
    assert list(map(bits, stepped(kind, dtype, options))) == list(map(bits, whole))
    assert max(map(len, cuts)) > 1 or "clip_norm" in options
    assert max(map(sum, cuts)) <= 2310 * numel_of_pair
    cuts.clear()
    monkeypatch.setattr(fused_calls, "SMALL_NUMEL", 1)
    monkeypatch.setattr(pieces, "LARGE_PIECE", 64)
    assert list(map(bits, stepped(kind, dtype, options))) == list(map(bits, whole))
    assert [64] in cuts
    # What does not lie in a row is copied as a whole.
    assert max(cuts) == [1200 * numel_of_pair]
    # Some are small, and some are not.
    monkeypatch.setattr(fused_calls, "SMALL_NUMEL", 100)
    assert list(map(bits, stepped(kind, dtype, options))) == list(map(bits, whole))


# As fp32 its inverse is another number.
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("options", [{"grad_scale": 0.3}, {"grad_scale": 0.3, "clip_value": 0.05}], ids=str)
@pytest.mark.parametrize("numel", [10, 10_000])
def test_a_factor_of_fp64_gradients_is_fp64(numel: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype.is_complex and "clip_value" in options:
        pytest.skip("there is no order of complex numbers")
    param, grad = torch.nn.Parameter(torch.zeros(numel, dtype=dtype)), numbers(1, numel, dtype=dtype)
    param.grad = grad.clone()
    SGD([param], lr=1.0, backend="native", **options).step()
    expected = -grad * 0.3
    if bound := options.get("clip_value"):
        expected = expected.clamp(-bound, bound)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_wide_default_dtype_changes_no_bit(kind: Any, options: dict[str, Any]) -> None:
    expected = stepped(kind, torch.float32, options)
    torch.set_default_dtype(torch.float64)
    try:
        found = stepped(kind, torch.float32, options)
    finally:
        torch.set_default_dtype(torch.float32)
    for tensor, other in zip(found, expected, strict=True):
        # Step counters are wide, as PyTorch's.
        assert bits(tensor.to(other.dtype)) == bits(other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("numel", [10, 10_000])
def test_a_default_device_of_others_changes_no_bit(numel: int, options: dict[str, Any]) -> None:
    found = []
    for device in ("cpu", "meta"):
        param = torch.nn.Parameter(numbers(0, numel))
        param.grad = numbers(1, numel)
        optimizer = Adam([param], lr=0.1, backend="native", **options)
        with torch.device(device):
            optimizer.step()
        found.append(bits(param))
    assert found[0] == found[1]
