"""The lines of a probe as tables of the performance page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Row = tuple[str, ...]

RESULTS = Path(__file__).parents[1] / "results" / "probe"

MODE_HEADINGS = ("stored", "device ms", "times as fast as our fp32", "ms a step", "host ms")
KERNEL_HEADINGS = ("what", "us", "of copy_")

# What the parameter and its states are stored in, by contender.
STORED = {
    "ours triton": "ours, fp32",
    "torch fused": "torch fused, fp32",
    "fp32 master": "ours, bf16 with an fp32 master",
    "split16": "ours, split16",
    "bf16 states": "ours, bf16 with bf16 states, rounded stochastically",
    "split8, 8-bit states": "ours, split8 with 8-bit states",
    "flashoptim": "flashoptim, 24-bit master with 8-bit states",
}


def read(folder: Path = RESULTS) -> dict[str, list[Line]]:
    """The lines of each device, in the order of its runs."""
    found: dict[str, list[Line]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        device = ""
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            device = line["name"] if line["part"] == "device" else device
            found.setdefault(device, []).append(line)
    return found


def _last(lines: Iterable[Line], *names: str) -> list[Line]:
    """Of lines that agree in these fields the last one."""
    return list({tuple(line[name] for name in names): line for line in lines}.values())


def mode_rows(lines: Sequence[Line]) -> tuple[str, list[Row]]:
    """A title and rows of the largest case in memory modes; no rows if none was measured."""
    modes = [line for line in lines if line["part"] == "mode"]
    largest = max((line["numel"] for line in modes), default=0)
    chosen = {line["contender"]: line for line in modes if line["numel"] == largest}
    title = f"Memory modes: one tensor of {largest:,} parameters"
    if "ours triton" not in chosen:
        return title, []
    ours = chosen["ours triton"]["device_us"]
    return title, [
        (
            STORED[name],
            f"{line['device_us'] / 1000:.3f}",
            f"{ours / line['device_us']:.2f}",
            f"{line['cold_us'] / 1000:.3f}",
            f"{line['host_us'] / 1000:.3f}",
        )
        for name, line in chosen.items()
    ]


def kernel_rows(lines: Sequence[Line]) -> list[Row]:
    """Norms, the launch before the update, launches and graphs."""
    rows: list[Row] = []
    for line in _last((line for line in lines if line["part"] == "norm"), "kind", "dtype", "tensors"):
        what = f"{line['kind']} norm, {line['dtype']}, {line['tensors']:,} tensors"
        rows.append((what, f"{1000 * line['ms']:.1f}", f"{line['of_copy']:.1%}"))
    for line in _last((line for line in lines if line["part"] == "advance"), "tensors", "partials"):
        norm = f", {line['partials']:,} partial norms" if line["partials"] else ""
        rows.append((f"counters and scalars of {line['tensors']:,} tensors{norm}", f"{line['us']:.1f}", ""))
    for line in _last((line for line in lines if line["part"] == "graph"), "capture", "tensors", "numel"):
        what = f"{line['tensors']:,} x {line['numel']:,}, {line['capture']} capture"
        rows.append(
            (f"a replayed step, {what}; launched it takes {line['eager_us']:.0f}", f"{line['replay_us']:.0f}", "")
        )
    rows += [
        ("host time of a launch", f"{line['host_us']:.1f}", "")
        for line in _last(line for line in lines if line["part"] == "launch")
    ]
    return rows
