"""The parts of a probe, the most valuable ones first."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.probe import kernels, steps
from benchmarks.probe.harness import Probe

PARTS: dict[str, Callable[[Probe], None]] = {
    "copy": kernels.copy,
    "launches": kernels.launches,
    "updates": kernels.updates,
    "norms": kernels.norms,
    "steps": steps.steps,
    "modes": steps.modes,
    "graphs": steps.graphs,
    "mode configs": steps.mode_configs,
    "small updates": kernels.small_updates,
    "advances": kernels.advances,
    "other updates": kernels.other_updates,
    "profile": steps.profile,
}
