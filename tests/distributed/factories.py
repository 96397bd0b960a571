"""The optimizers that scenarios are given by name: PyTorch's, ours on each backend, and a check of the harness."""

from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim import AdamW

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def whole(tensor: Any) -> Tensor:
    """A copy of a tensor as one process would have it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def own(tensor: Any) -> Tensor:
    """A copy of what this process has of a tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def params_of(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


class Clipping(torch.optim.AdamW):
    """PyTorch's, with `max_grad_norm` by whole gradients: it stands in for ours to check the harness."""

    def __init__(
        self,
        params: Any,
        max_grad_norm: float = 0.0,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, **kwargs)
        self._max_grad_norm, self._norm_type, self._skips = max_grad_norm, norm_type, skip_nonfinite
        self.grad_norm: Any = None
        self.n_skipped_steps = 0

    def step(self, closure: Any = None) -> Any:
        if self._max_grad_norm or self._skips:
            grads = [param.grad for param in params_of(self) if param.grad is not None]
            norms = [torch.linalg.vector_norm(whole(grad).double(), self._norm_type) for grad in grads]
            self.grad_norm = torch.linalg.vector_norm(torch.stack(norms), self._norm_type)
            if self._skips and not torch.isfinite(self.grad_norm):
                self.n_skipped_steps += 1
                return None
            factor = (self._max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0) if self._max_grad_norm else 1.0
            for grad in grads:
                grad.mul_(float(factor))
        return super().step(closure)


def make(name: str, params: Any, **options: Any) -> Any:
    """Build "torch", "clipping", or ours on the backend "native", "triton" or "eager"."""
    if name == "torch":
        return torch.optim.AdamW(params, fused=True, **OPTIONS, **options)
    if name == "clipping":
        return Clipping(params, fused=True, **OPTIONS, **options)
    return AdamW(params, epsilon_hat=False, backend=name, **OPTIONS, **options)


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected) > 0
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.numel()]
    return max(float((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs)
