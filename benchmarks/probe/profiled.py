"""A few steps on one large tensor, with a gradient norm, in fp32 and with 8-bit states: for a profiler."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe.profiled", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, in triton's interpreter, a tiny tensor")
    options = parser.parse_args(arguments)
    if options.dry:
        # Read once, when triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from dragon.vm.torch.optim import Adam

    shape, device = ((64, 64), "cpu") if options.dry else ((8192, 16384), "cuda")
    modes: dict[torch.dtype, dict[str, Any]] = {
        torch.float32: {},
        torch.bfloat16: {"master_weights": "split8", "state_dtype": "8bit"},
    }
    for dtype, mode in modes.items():
        param = torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device))
        optimizer = Adam([param], max_grad_norm=1.0, backend="triton", **mode)
        for _ in range(2):
            param.grad = torch.randn_like(param)
            optimizer.step()
        print(f"2 steps with {param.numel():,} elements of {dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
