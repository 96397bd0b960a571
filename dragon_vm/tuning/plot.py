"""A picture of results: time over chunk and warps as a heat map, and each kernel under the memory's roof."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dragon.vm.tuning.record import Record, Times
from dragon.vm.tuning.scratch import nbytes_per_element
from dragon.vm.tuning.store import variant_name

# Floating-point operations of an element, counted in the kernels' source; a root and a quotient are one each.
OPERATIONS = {"adam": 18, "sgd": 8, "accumulate": 6}

N_COLUMNS = 3


def best_times(record: Record) -> dict[tuple[int, int], float]:
    """The fastest measured time of each chunk size and number of warps."""
    times: dict[tuple[int, int], float] = {}
    for trial in record.trials:
        if trial.summary is not None:
            key = (trial.config.chunk, trial.config.n_warps)
            times[key] = min(times.get(key, math.inf), trial.summary.median_ms)
    return times


def roofline_point(record: Record, times: Times) -> tuple[float, float]:
    """Operations a byte, and billions of operations a second."""
    intensity = OPERATIONS[record.variant.algorithm] / nbytes_per_element(record.variant)
    return intensity, intensity * times.nbytes / times.best.median_ms / 1e6


def copy_speed(times: Times) -> float:
    """GB/s of the `copy_` that a result is compared with: the slope of the roof."""
    return times.nbytes / times.copy_ms / 1e6


def plot(records: Sequence[Record], path: Path) -> None:
    """Write a picture of measured results.

    Raises:
        ValueError: if none is measured, or the format is unknown.
        OSError: if the file cannot be written.
    """
    measured = [record for record in records if record.times is not None]
    if not measured:
        raise ValueError("no measured result to plot: run `dragon-vm tune` on a GPU first")
    n_rows = -(-(len(measured) + 1) // N_COLUMNS)
    figure = Figure(figsize=(5 * N_COLUMNS, 4 * n_rows), layout="constrained")
    axes = [figure.add_subplot(n_rows, N_COLUMNS, place + 1) for place in range(len(measured) + 1)]
    _roofline(axes[0], measured)
    for place, record in zip(axes[1:], measured, strict=True):
        _heat_map(figure, place, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _heat_map(figure: Figure, axes: Axes, record: Record) -> None:
    times = best_times(record)
    chunks = sorted({chunk for chunk, _ in times})
    warps = sorted({n_warps for _, n_warps in times})
    grid = [[times.get((chunk, n_warps), math.nan) for chunk in chunks] for n_warps in warps]
    image = axes.imshow(grid, aspect="auto", cmap="viridis_r")
    figure.colorbar(image, ax=axes, label="ms")
    axes.set_xticks(range(len(chunks)), list(map(str, chunks)))
    axes.set_yticks(range(len(warps)), list(map(str, warps)))
    axes.set(xlabel="chunk", ylabel="warps")
    axes.set_title(f"{variant_name(record.variant)}\n{record.case}, {record.device}", fontsize=8)
    if record.config.chunk in chunks and record.config.n_warps in warps:
        chosen = (chunks.index(record.config.chunk), warps.index(record.config.n_warps))
        axes.plot(*chosen, "r*", markersize=14, label="in force")
        axes.legend(fontsize=7)


def _roofline(axes: Axes, records: Sequence[Record]) -> None:
    points, slope = [], 0.0
    for record in records:
        if record.times is not None:
            points.append(roofline_point(record, record.times))
            slope = max(slope, copy_speed(record.times))
            axes.plot(*points[-1], "o", label=f"{variant_name(record.variant)}, {record.case}")
    span = [min(x for x, _ in points) / 2, max(x for x, _ in points) * 2]
    axes.plot(span, [slope * x for x in span], "k-", label="the fastest copy_")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="Gop/s")
    axes.set_title("Roofline", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=6)
