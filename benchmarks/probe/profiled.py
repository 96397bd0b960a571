"""A few steps on one large tensor, with a gradient norm, for a profiler to look at."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

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

    param = torch.nn.Parameter(
        torch.randn(2**12 if options.dry else 2**27, device="cpu" if options.dry else "cuda")
    )
    optimizer = Adam([param], max_grad_norm=1.0, backend="triton")
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    print(f"3 steps with {param.numel():,} elements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
