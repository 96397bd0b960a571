"""Large gradients that a native step copies are copied piece by piece: the bits stay, and so do the gradients."""

from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._backends import fused_calls

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
    params.append(torch.nn.Parameter(numbers(9, 40, 30, dtype=dtype).t()))
    optimizer = kind(params, lr=0.1, backend="native", **options)
    for step in range(3):
        grads = [numbers(step, *param.shape, dtype=dtype) for param in params]
        # The first one misses a step: its count is another.
        present = list(zip(params, grads, strict=True))[step == 1 :]
        for param, grad in present:
            param.grad = grad.clone()
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
    # Small tensors are copied as they are.
    whole = stepped(kind, dtype, options)
    monkeypatch.setattr(fused_calls, "SINGLE_THREAD_NUMEL", 1)
    cuts: list[int] = []
    plain = fused_calls.FusedCall.limited

    def counting(call: Any, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        cuts.append(grads[0].numel())
        return plain(call, grads)

    monkeypatch.setattr(fused_calls.FusedCall, "limited", counting)
    monkeypatch.setattr(fused_calls, "PIECE_NUMEL", 64)
    assert list(map(bits, stepped(kind, dtype, options))) == list(map(bits, whole))
    assert 64 in cuts
    # What does not lie in a row is copied as a whole.
    assert max(cuts) == 2 * 1200 if dtype.is_complex else 1200
