"""What a result belongs to: the architecture, the kernels' source, and the versions it was made with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from functools import cache
from pathlib import Path

# Beside the module of the algorithm itself: what else decides what an update kernel is compiled from.
SHARED_SOURCES = ("pointwise", "table", "launch")

VERSIONED = ("torch", "triton")


def arch_name(arch: str) -> str:
    """The name of an architecture in files and on the command line: "sm_90" for "90", others as they are."""
    return f"sm_{arch}" if arch.isdigit() else arch


def is_arch(name: str) -> bool:
    """Whether the text names an architecture that kernels can be compiled for."""
    return re.fullmatch(r"sm_\d+|gfx[91][0-9a-f]+", name) is not None


def arch_key(arch: str) -> str:
    """The inverse of `arch_name`: the key of `dragon.kernels.default_config`."""
    return arch.removeprefix("sm_")


def slug(text: str) -> str:
    """The text as a file name on any system."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "unnamed"


@cache
def kernel_hash(algorithm: str) -> str:
    """A hash of the source that an algorithm's update kernel is compiled from; triton is not imported."""
    spec = importlib.util.find_spec("dragon.kernels")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("dragon.kernels is not installed beside dragon.vm")
    folder = Path(spec.origin).parent
    digest = hashlib.sha256()
    for name in (*SHARED_SOURCES, algorithm):
        # In universal newlines, so that a checkout on another system has the same hash.
        digest.update((folder / f"{name}.py").read_text(encoding="utf-8").encode())
        digest.update(b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that a result depends on, "absent" for what is not installed."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
