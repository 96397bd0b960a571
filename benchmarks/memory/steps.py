"""Time a step of the native backend in each memory mode beside its fp32 step.

It is run by ``python -m benchmarks.memory.steps``.

The modes take turns on GPT-2's shapes. A ratio is the median over the rounds of a mode's time by that of fp32 in
the same round. On one thread the time is the processor's, which other processes do not add to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.memory.modes import BF16, FP32, MODES, OURS, Mode
from dragon.vm.measuring.arguments import positive
from dragon.vm.measuring.shapes import Shapes, gpt2
from dragon.vm.torch.optim import AdamW

REFERENCE = "fp32"
# What rounds to nearest takes the same operations and no random words.
TIMED = {name: MODES[name] for name in OURS if "to nearest" not in name} | {
    # Their quality is that of other modes.
    "split16, bf16 states": Mode(BF16, {"master_weights": "split16", "state_dtype": BF16}),
    "fp32 masters": Mode(BF16, {"master_weights": FP32, "state_dtype": FP32}),
}


def optimizer_of(mode: str, shapes: Shapes) -> AdamW:
    """The optimizer of parameters with gradients, after its first step."""
    dtype, options, _ = TIMED[mode]
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(dtype)
    optimizer = AdamW(params, backend="native", **options)
    optimizer.step()
    return optimizer


def measure(modes: list[str], shapes: Shapes, n_rounds: int) -> list[dict[str, Any]]:
    """One record a mode: the median time and the ratio to fp32."""
    optimizers = {mode: optimizer_of(mode, shapes) for mode in {REFERENCE: None, **dict.fromkeys(modes)}}
    times: dict[str, list[float]] = {mode: [] for mode in optimizers}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(n_rounds):
        for mode, optimizer in optimizers.items():
            start = clock()
            optimizer.step()
            times[mode].append(clock() - start)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    return [
        {
            "mode": mode,
            "numel": numel,
            "threads": torch.get_num_threads(),
            "step_ms": round(1e3 * statistics.median(taken), 2),
            "ratio": round(statistics.median(map(float.__truediv__, taken, times[REFERENCE])), 2),
        }
        for mode, taken in times.items()
    ]


def main() -> None:
    """Print a line a mode; the command line is described by ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.steps", description=__doc__)
    parser.add_argument(
        "--layers", type=positive, default=12, help="of GPT-2; 12 are the model of 124M parameters"
    )
    parser.add_argument("--vocabulary", type=positive, default=50257)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--mode", action="append", choices=TIMED, help="may be repeated; by default all")
    parser.add_argument("--output", type=Path, help="a file to write one JSON line a mode to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = gpt2(options.layers, 768, options.vocabulary)
    records = measure(options.mode or list(TIMED), shapes, options.rounds)
    for record in records:
        print(f"{record['mode']:30} {record['step_ms']:10.1f} ms {record['ratio']:8.2f} x fp32")
    if options.output:
        environment = describe(torch.device("cpu"))
        lines = [json.dumps({**record, "environment": environment}) + "\n" for record in records]
        options.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
