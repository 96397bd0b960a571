"""Every kernel variant on small odd-sized tensors, for compute-sanitizer: `python -m tests.sanitize`.

What it computes is held against the eager backend, so that a kernel that does nothing is no success.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Around the borders of vectors, of chunks and of a norm's spans.
SIZES = (1, 7, 15, 16, 17, 31, 1023, 1024, 1025, 2049, 32767, 32769)
DRY_SIZES = (1, 17, 1025)

# Of tensors whose states may have 8 bits.
BLOCK_SHAPES = ((64, 64), (3, 1408), (2, 16448), (129, 320))
DRY_BLOCK_SHAPES = ((3, 1408),)

N_STEPS = 2
LR = 0.01


class Variant(NamedTuple):
    """An optimizer that needs a kernel of its own.

    Attributes:
        name: in words.
        optimizer: name of a class.
        param, state: dtypes.
        options: arguments of the class.
        zero_grad: zero the gradients in the same launch.
        sums: add the gradients up first.
        exact: parameters and states must have the bits of the eager backend on the CPU.
        only_blocks: leave out tensors whose states cannot have 8 bits: as plain fp32 they are rounded otherwise.
        scale: what a `GradScaler` hands over; what the step leaves of the gradients is compared as well.
    """

    name: str
    optimizer: str = "Adam"
    param: torch.dtype = torch.float32
    state: torch.dtype | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed, and a NamedTuple's default
    zero_grad: bool = False
    sums: bool = False
    exact: bool = False
    only_blocks: bool = False
    scale: float | None = None


# Of bf16 parameters.
MODES: dict[str, dict[str, Any]] = {
    "stochastic rounding": {"stochastic_rounding": True},
    "bf16 states, stochastic rounding": {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    "bf16 states, amsgrad": {"master_weights": "split16", "state_dtype": torch.bfloat16, "amsgrad": True},
    "split16": {"master_weights": "split16"},
    "split16, 8-bit states": {"master_weights": "split16", "state_dtype": "8bit"},
    "split8": {"master_weights": "split8"},
    "split8, 8-bit states": {"master_weights": "split8", "state_dtype": "8bit"},
    "split8, 8-bit states, nearest": {
        **{"master_weights": "split8", "state_dtype": "8bit"},
        "stochastic_rounding": False,
    },
    "fp32 master": {"master_weights": torch.float32},
}

VARIANTS = (
    Variant("fp32"),
    Variant("fp32 weight decay", options={"weight_decay": 0.1}),
    Variant("fp32 AdamW", "AdamW"),
    Variant("fp32 amsgrad", options={"amsgrad": True}),
    Variant("fp32 average", options={"ema_decay": 0.9}),
    Variant("fp32 zero_grad", zero_grad=True),
    Variant("fp32 sum_grad", sums=True),
    Variant("fp32 scaled", scale=3.0),
    Variant("fp32 global norm", options={"max_grad_norm": 0.5, "skip_nonfinite": True}),
    Variant("fp32 largest element", options={"max_grad_norm": 0.5, "norm_type": float("inf")}),
    Variant("fp32 norm of each", options={"clip_norm": 0.5}),
    Variant("fp32 clip value", options={"clip_value": 0.5}),
    Variant("bf16", param=torch.bfloat16),
    Variant("bf16, fp32 state", param=torch.bfloat16, state=torch.float32),
    Variant("bf16 global norm", param=torch.bfloat16, options={"max_grad_norm": 0.5}),
    Variant("fp16", param=torch.float16),
    Variant("fp16 scaled", param=torch.float16, scale=8.0),
    Variant("fp64", param=torch.float64),
    Variant("complex64", param=torch.complex64),
    Variant("SGD fp32", "SGD"),
    Variant("SGD fp32 momentum", "SGD", options={"momentum": 0.9, "nesterov": True}),
    Variant("SGD bf16 momentum", "SGD", param=torch.bfloat16, options={"momentum": 0.9}),
    *(
        Variant(f"mode {name}", param=torch.bfloat16, options={"eps": 1e-6, **options}, exact=True)
        for name, options in MODES.items()
    ),
    Variant("mode fp32, bf16 states", options={"state_dtype": torch.bfloat16}, exact=True),
    Variant("mode fp32, 8-bit states", options={"state_dtype": "8bit"}, exact=True, only_blocks=True),
)


def shapes_of(variant: Variant, dry: bool) -> list[tuple[int, ...]]:
    """The shapes that a variant is tried with."""
    plain = [] if variant.only_blocks else [(size,) for size in (DRY_SIZES if dry else SIZES)]
    blocks = (DRY_BLOCK_SHAPES if dry else BLOCK_SHAPES) if variant.exact else ()
    return [*plain, *blocks]


def tensors(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Normal tensors of each shape, aligned and, one element further, misaligned."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(start + math.prod(shape), dtype=dtype, generator=generator).to(device)[start:].view(shape)
        for shape in shapes
        for start in (0, 1)
    ]


def stepped(
    variant: Variant, backend: str, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[list[Tensor]]:
    """Each parameter after a few steps, with what a scaled loss leaves of its gradient, and its states."""
    from dragon.vm.torch import optim

    params = [torch.nn.Parameter(value) for value in tensors(shapes, variant.param, device, seed=0)]
    optimizer = getattr(optim, variant.optimizer)(
        [{"params": params[::2]}, {"params": params[1::2], "lr": LR / 2}],
        **{"lr": LR, "backend": backend, "state_dtype": variant.state, **variant.options},
    )
    for index in range(N_STEPS):
        for param, grad in zip(params, tensors(shapes, variant.param, device, seed=index + 1), strict=True):
            param.grad = grad
        if variant.sums:
            optimizer.sum_grad()
        if variant.scale is not None:
            optimizer.grad_scale = torch.full((1,), variant.scale, device=device)
        optimizer.step(zero_grad=variant.zero_grad)
    left = [[param.grad] if variant.scale is not None else [] for param in params]
    return [
        [param.detach(), *grad, *optimizer.state[param].values()] for param, grad in zip(params, left, strict=True)
    ]


def same_bits(ours: Any, theirs: Any) -> bool:
    """Whether two states are equal, tensors wherever they are."""
    return torch.equal(ours.cpu(), theirs.cpu()) if isinstance(theirs, Tensor) else bool(ours == theirs)


def difference(variant: Variant, shapes: Sequence[tuple[int, ...]], device: torch.device) -> float:
    """The largest difference from the eager backend, beyond rounding of the parameters, in learning rates.

    Infinity if bits differ that must not.
    """
    found = stepped(variant, "triton", shapes, device)
    expected = stepped(variant, "eager", shapes, torch.device("cpu") if variant.exact else device)
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if variant.exact and not all(map(same_bits, ours, theirs)):
            return float("inf")
        for own, other in list(zip(ours, theirs, strict=True))[: 1 if variant.scale is None else 2]:
            other = other.to(device)
            # A rounding may fall the other way in either.
            rounding = 2 * N_STEPS * torch.finfo(variant.param).eps * other.abs()
            excess = float(((own - other).abs().double() - rounding.double()).max())
            worst = max(worst, excess / LR) if excess == excess else float("inf")
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all variants; returns 1 if one of them differs from the eager backend."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, in triton's interpreter, fewer sizes")
    parser.add_argument("--variant", default="", metavar="TEXT", help="only variants with TEXT in their name")
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        # Triton reads that once: it is imported here.
        from .interpreter import speed_up

        speed_up()
    device = torch.device("cpu" if options.dry else "cuda")
    chosen = [variant for variant in VARIANTS if options.variant in variant.name]
    if not chosen:
        parser.error(f"--variant {options.variant!r}: no variant has it in its name")
    failed = []
    for variant in chosen:
        worst = difference(variant, shapes_of(variant, options.dry), device)
        # States of 16 bits are rounded in another place by the eager backend.
        fine = worst <= (0.1 if torch.finfo(variant.param).bits <= 16 else 1e-3)
        print(f"{variant.name}: {'as' if fine else 'NOT as'} eager, {worst:.2g} learning rates apart", flush=True)
        if not fine:
            failed.append(variant.name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
