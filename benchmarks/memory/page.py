"""The tables and pictures of docs/memory.md, made of the committed measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.memory.modes import MODES, trained

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "memory" / "modes.jsonl"
PAGE = ROOT / "docs" / "memory.md"
PICTURES = ROOT / "docs" / "images"
BEGIN, END = "<!-- measured: benchmarks.memory -->", "<!-- end of what is measured -->"

Line = dict[str, Any]


def read(path: Path = RESULTS) -> list[Line]:
    """The measurements."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept_bytes(mode: str) -> float:
    """Bytes a parameter of the parameter and its states, for large tensors."""
    param = torch.zeros(64, 64)
    param.grad = torch.zeros_like(param)
    optimizer = trained([param], MODES[mode])
    # There are states after a step.
    optimizer.step(0.0)
    return optimizer.nbytes() / param.numel()


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return f"{value:.2f}" if value < 1e3 else f"{value:.0e}".replace("e+0", "e")


def _losses(lines: Sequence[Line], mode: str, training: str) -> list[float]:
    found = [line for line in lines if line["measure"] == "final_loss" and line["of"] == training]
    return [line["value"] for line in sorted(found, key=lambda line: line["seed"]) if line["mode"] == mode]


def _difference(lines: Sequence[Line], mode: str, training: str) -> str:
    pairs = zip(_losses(lines, mode, training), _losses(lines, "fp32", training), strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    if not all(map(math.isfinite, differences)):
        return "NaN"
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{mean(differences):+.4f} ± {error:.4f}"


def table(lines: Sequence[Line]) -> str:
    """One row a mode."""
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    rows = [
        "| stored | bytes kept | largest update / lr | cannot forget | text, held out | digits, training |",
        "|---|---|---|---|---|---|",
    ]
    for mode in modes:
        own = [line for line in lines if line["mode"] == mode]
        updates = [line["value"] for line in own if line["measure"] == "largest_update"]
        largest = math.nan if any(map(math.isnan, updates)) else max(updates)
        ratio = next(line["value"] for line in own if line["measure"] == "forgetting")
        if mode == "fp32":
            text, digits = (f"{mean(_losses(lines, mode, name)):.4f}" for name in ("text", "digits"))
        else:
            text, digits = (_difference(lines, mode, name) for name in ("text", "digits"))
        kept = f"{kept_bytes(mode):.4g}"
        rows.append(f"| {mode} | {kept} | {_number(largest)} | {_number(ratio)} | {text} | {digits} |")
    return "\n".join(rows)


def section(lines: Sequence[Line]) -> str:
    """What the page says of the measurements."""
    environment = lines[0]["environment"]
    n_seeds = len(_losses(lines, "fp32", "text"))
    return (
        f"{BEGIN}\n\n{table(lines)}\n\n"
        f"Means over {n_seeds} seeds with their standard errors; losses are differences to fp32's of the same "
        f"seed, in nats. Measured on "
        f"{environment['device']} with torch {environment['versions']['torch']}, commit "
        f"{environment['commit'][:10]}, {environment['date']}.\n\n{END}"
    )


def _largest_updates(lines: Sequence[Line]) -> Figure:
    figure = Figure((9, 4.5), layout="constrained")
    axes = figure.subplots()
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    names = list(dict.fromkeys(line["of"] for line in lines if line["measure"] == "largest_update"))
    for marker, name in zip(cycle("osD^vP"), names, strict=False):
        found = {line["mode"]: line["value"] for line in lines if line.get("of") == name}
        axes.plot([found[mode] for mode in modes], marker, label=name)
    axes.axhline(7.27, color="grey", linewidth=1)
    axes.text(0, 9, "bound of exact Adam", color="grey")
    axes.set(yscale="log", ylabel="largest update / learning rate", title="Adversarial gradients")
    axes.set_xticks(range(len(modes)), modes, rotation=35, ha="right")
    axes.legend(fontsize="small")
    return figure


def _curves(lines: Sequence[Line]) -> Figure:
    figure = Figure((11, 4.5), layout="constrained")
    for axes, training in zip(figure.subplots(1, 2), ("text", "digits"), strict=True):
        for style, mode in zip(
            cycle(("-", "--", ":")), dict.fromkeys(line["mode"] for line in lines), strict=False
        ):
            own = [line for line in lines if line["measure"] == "final_loss" and line["of"] == training]
            losses = [line["losses"] for line in own if line["mode"] == mode]
            means = [mean(values) for values in zip(*losses, strict=True)]
            axes.plot([10 * i for i in range(len(means))], means, style, label=mode, linewidth=1)
        axes.set(yscale="log", xlabel="step", ylabel="training loss", title=training)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def write_page() -> None:
    """Bring the page's tables and its pictures up to date."""
    lines = read()
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + section(lines) + rest.partition(END)[2], encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    # The same picture from the same numbers: no date, no random names.
    with mpl.rc_context({"svg.hashsalt": "dragon", "svg.fonttype": "none"}):
        for name, figure in (("memory-updates", _largest_updates(lines)), ("memory-losses", _curves(lines))):
            figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
