"""The lines of a probe as tables of the performance page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Row = tuple[str, ...]

RESULTS = Path(__file__).parents[1] / "results" / "probe"

MODE_HEADINGS = ("stored", "device ms", "times as fast as our fp32", "ms a step", "host ms")
KERNEL_HEADINGS = ("what", "us", "of copy_")
CONFIG_HEADINGS = ("stored", "elements / warps of a program: us a step")

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
    """The lines of each device, in the order of its runs, but for what has failed.

    Raises:
        ValueError: for a line that is none of a probe's.
    """
    found: dict[str, list[Line]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        device = ""
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            # The last line of a killed process may be cut off.
            if not text.endswith("}"):
                continue
            try:
                line = json.loads(text)
                device = line["name"] if line["part"] == "device" else device
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
            if not line.get("failed"):
                found.setdefault(device, []).append(line)
    return found


def _last(lines: Iterable[Line], *names: str) -> list[Line]:
    """Of lines that agree in these fields the last one."""
    return list({tuple(line[name] for name in names): line for line in lines}.values())


def mode_tables(lines: Sequence[Line]) -> list[tuple[str, list[Row]]]:
    """For each case in memory modes, the largest first, a title and rows."""
    cases: dict[tuple[int, int], dict[str, Line]] = {}
    for line in lines:
        if line["part"] == "mode":
            cases.setdefault((line["numel"], line["tensors"]), {})[line["contender"]] = line
    tables: list[tuple[str, list[Row]]] = []
    for (numel, n_tensors), chosen in sorted(cases.items(), reverse=True):
        if "ours triton" in chosen:
            what = f"one tensor of {numel:,}" if n_tensors == 1 else f"{n_tensors:,} tensors, {numel:,}"
            ours = chosen["ours triton"]["device_us"]
            rows: list[Row] = [
                (
                    STORED[name],
                    f"{line['device_us'] / 1000:.3f}",
                    f"{ours / line['device_us']:.2f}",
                    f"{line['cold_us'] / 1000:.3f}",
                    f"{line['host_us'] / 1000:.3f}",
                )
                for name, line in chosen.items()
            ]
            tables.append((f"Memory modes: {what} parameters", rows))
    return tables


def config_rows(lines: Sequence[Line]) -> list[Row]:
    """For each memory mode the device time of a step by launch configuration, the fastest first."""
    modes: dict[str, dict[str, float]] = {}
    for line in lines:
        if line["part"] == "mode config":
            modes.setdefault(line["mode"], {})[line["config"]] = line["us"]
    return [
        (mode, ", ".join(f"{config}: {us:.0f}" for config, us in sorted(times.items(), key=itemgetter(1))))
        for mode, times in modes.items()
    ]


def kernel_rows(lines: Sequence[Line]) -> list[Row]:
    """Norms, the launch before the update, launches and graphs."""
    rows: list[Row] = []
    for line in _last((line for line in lines if line["part"] == "norm"), "kind", "dtype", "tensors"):
        what = f"{line['kind']} norm, {line['dtype']}, {line['tensors']:,} tensors"
        # Without a part that measured the copy there is no share of it.
        share = "" if line["of_copy"] is None else f"{line['of_copy']:.1%}"
        rows.append((what, f"{1000 * line['ms']:.1f}", share))
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
