"""Show what each mode costs and what it learns: a table and a picture."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

from examples.gpt.training import Run

SMOOTHED_STEPS = 25


def table(runs: dict[str, Run], title: str) -> Table:
    """Return one row a mode."""
    result = Table(title=title)
    result.add_column("mode", no_wrap=True)
    for heading in ("held-out loss", "bytes of states", "bytes a parameter", "ms a step"):
        result.add_column(heading, justify="right")
    for name, run in runs.items():
        result.add_row(
            name,
            f"{run.held_out_loss:.3f}",
            f"{run.state_bytes:,}",
            f"{run.bytes_per_param:.1f}",
            f"{run.step_ms:.3f}",
        )
    return result


def plot(runs: dict[str, Run], path: Path) -> None:
    """Write a PNG: the loss of every mode, how far it is from the first mode's, and the bytes that it keeps."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    losses, differences, memory = figure.subplots(1, 3)
    first = next(iter(runs))
    for number, (name, run) in enumerate(runs.items()):
        curve = smoothed(run.losses)
        losses.plot(curve, label=name, color=f"C{number}")
        differences.plot(curve - smoothed(runs[first].losses), label=name, color=f"C{number}")
        memory.barh(name, run.bytes_per_param, color=f"C{number}")
    losses.set(xlabel="step", ylabel="training loss", title="A small GPT learns Python's documentation")
    differences.set(xlabel="step", ylabel="difference of training losses", title=f"Difference from {first}")
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
        axes.legend()
    memory.invert_yaxis()
    memory.set(xlabel="bytes a parameter", title="Weights and states")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def smoothed(losses: list[float]) -> torch.Tensor:
    """Return the mean of each loss and the ones before it, float64 [n_steps]."""
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(losses) + 1)
    starts = (ends - SMOOTHED_STEPS).clamp(min=0)
    return (sums[ends] - sums[starts]) / (ends - starts)
