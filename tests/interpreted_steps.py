"""A digest of interpreted steps, by triton's own interpreter: ``python interpreted_steps.py``."""

import hashlib
from typing import Any

import torch

from dragon.vm.torch.optim import SGD, Adam

BF16 = torch.bfloat16
CASES = (
    (Adam, torch.float32, {"max_grad_norm": 1.0, "weight_decay": 0.1, "amsgrad": True}),
    (Adam, torch.float64, {"clip_norm": 0.5, "maximize": True, "ema_decay": 0.9}),
    (Adam, BF16, {"master_weights": "split8", "state_dtype": "8bit"}),
    (Adam, BF16, {"stochastic_rounding": True, "state_dtype": BF16}),
    (SGD, torch.float16, {"momentum": 0.9, "nesterov": True, "clip_value": 0.3}),
)


def digest() -> str:
    """Of parameters and states after steps with infinite, tiny and negative numbers, and misaligned tensors."""
    found = hashlib.sha256()
    for kind, dtype, options in CASES:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(64, 64, generator=generator).to(dtype))]
        params.append(torch.nn.Parameter(torch.randn(38, generator=generator).to(dtype)[1:]))
        optimizer = kind(params, lr=0.1, backend="triton", **options)
        for step in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).mul_(10.0 ** (step - 3)).to(dtype)
                param.grad.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-7])
            optimizer.step()
        for param in params:
            values = {"param": param.detach(), **optimizer.state[param]}
            for _, value in sorted(values.items()):
                if isinstance(value, torch.Tensor):
                    value = value.contiguous().reshape(-1).clone().view(torch.uint8).tolist()
                found.update(repr(value).encode())
    return found.hexdigest()


def demand_bools() -> None:
    """Let the interpreter refuse masks that are not made of bools, as that of triton 3.9 does."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        assert mask.data.dtype == bool, mask.data.dtype
        return load(self, ptrs, mask, *others)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        assert mask.data.dtype == bool, mask.data.dtype
        return store(self, ptrs, value, mask, *others)

    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store


if __name__ == "__main__":
    demand_bools()
    print(digest())
