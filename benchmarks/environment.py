"""Where and with what a measurement was made: enough to make it again."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dragon.vm.measuring.machine import device_name, versions

ROOT = Path(__file__).parents[1]

# Distributions whose versions are recorded where they are installed.
DISTRIBUTIONS = (
    *("torch", "triton", "dragon-vm-torch", "torch-optimi", "flashoptim"),
    *("apex", "transformer-engine", "bitsandbytes", "torchao"),
)


def describe(device: torch.device) -> dict[str, Any]:
    """The fields of a record that are the same for a whole run."""
    now = datetime.now(timezone.utc).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    return {
        "run": f"{now}-{os.getpid()}",
        "date": now,
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "n_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions(DISTRIBUTIONS)},
    }


def commit() -> str:
    """The commit that is measured: DRAGON_COMMIT, or git's, marked if files that are tracked differ from it."""
    if given := os.environ.get("DRAGON_COMMIT"):
        return given
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def free_nbytes(device: torch.device) -> float:
    """Bytes that the tensors of one case may take."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable"):
            return 0.5 * 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo does not say how much memory is available")


def _driver() -> str | None:
    try:
        lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return torch.version.hip
    return lines[0].strip() if lines else None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
