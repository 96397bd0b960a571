"""Pictures of the records, each with a digest of what it shows, so that a stale one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import TIMED, Record
from benchmarks.runner import COPY

MARKERS = "osD^vP*X<>"

# Characters of a line under a group of bars.
LABEL_WIDTH = 9


class Plot(NamedTuple):
    """A log-log picture, or bars if it has categories.

    Attributes:
        name: of its file, without a suffix.
        title, x, y: texts.
        series: by name, points (x, y), sorted; those of `copy_` are joined by a line. The x of a bar is the
            index of its category.
        categories: names of the groups of bars.
    """

    name: str
    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    categories: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What changes if anything shown does."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]


def roofline(records: Sequence[Record], name: str) -> Plot:
    """Bandwidth that each contender reaches in fp32 over the bytes that a step moves, under that of a copy."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.status == TIMED and record.gb_per_s is not None and _is_plain(record):
            assert record.busy_ms is not None
            gigabytes = record.gb_per_s * record.busy_ms.median / 1e3
            series.setdefault(record.contender, []).append((gigabytes, record.gb_per_s))
    return Plot(name, "Bandwidth, fp32", "GB moved in a step", "GB/s", _sorted(series))


def speeds(records: Sequence[Record], name: str) -> Plot:
    """How many times as fast as the reference each contender is in fp32, case by case."""
    shown = [record for record in records if record.ratio is not None and record.precision == "fp32"]
    cases = tuple(dict.fromkeys(record.case for record in shown))
    series: dict[str, list[tuple[float, float]]] = {}
    for record in shown:
        assert record.ratio is not None
        series.setdefault(record.contender, []).append((cases.index(record.case), record.ratio.median))
    return Plot(name, "Speed of a step, fp32", "", "times as fast as torch fused", _sorted(series), cases)


def _is_plain(record: Record) -> bool:
    return record.precision == "fp32" and not record.chain


def _sorted(series: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """Series with their points in order; digits beyond what a picture shows are dropped."""
    return {
        name: sorted((float(f"{x:.4g}"), float(f"{y:.4g}")) for x, y in points) for name, points in series.items()
    }


def draw(plot: Plot, folder: Path) -> Path:
    """Write the picture as SVG and return its path."""
    style: Any = {"svg.hashsalt": plot.name, "svg.fonttype": "none"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8.5, 3.6 if plot.categories else 4.8), layout="constrained")
        axes = figure.subplots()
        (_draw_bars if plot.categories else _draw_points)(plot, axes)
        axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
        axes.grid(alpha=0.3, axis="y" if plot.categories else "both")
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{plot.name}.svg"
        figure.savefig(path, metadata={"Date": None, "Description": plot.digest})
    return path


def _draw_points(plot: Plot, axes: Axes) -> None:
    for (name, points), marker in zip(plot.series.items(), cycle(MARKERS), strict=False):
        ours = name.startswith("ours")
        look: dict[str, Any] = {"marker": marker, "markersize": 7 if ours else 4, "linestyle": ""}
        if name == COPY:
            look = {"color": "black", "linestyle": "--", "zorder": 1}
        axes.plot(*zip(*points, strict=True), label=name, **look)
    axes.set(xscale="log", yscale="log")


def _draw_bars(plot: Plot, axes: Axes) -> None:
    width = 0.8 / len(plot.series)
    for index, (name, points) in enumerate(plot.series.items()):
        places = [x + (index - (len(plot.series) - 1) / 2) * width for x, _ in points]
        axes.bar(places, [y for _, y in points], width, label=name, zorder=2)
    labels = [fill(name, LABEL_WIDTH) for name in plot.categories]
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.axhline(1, color="black", linewidth=0.8, zorder=3)
