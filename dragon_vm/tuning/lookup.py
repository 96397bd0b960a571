"""The configuration in force, and why: this user's result, else the package's, else the default."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.launch import Variant
from dragon.vm.tuning._fields import RecordError
from dragon.vm.tuning.identity import arch_key, arch_name, slug
from dragon.vm.tuning.record import ESTIMATED, Record
from dragon.vm.tuning.sizes import fingerprint, size_class
from dragon.vm.tuning.store import check_current, find_result, ignore, read_bundle, tuning_dir


class Found(NamedTuple):
    """A configuration and where it is from.

    Attributes:
        config: how to launch.
        source: "user", "packaged" or "default".
        why: in words.
        record: what it is read from, None for the default.
    """

    config: LaunchConfig
    source: str
    why: str
    record: Record | None = None


def config_for(variant: Variant, arch: str, device: str, numels: Sequence[int]) -> LaunchConfig:
    """The configuration to launch a kernel with; files are read once for each distinct question.

    Args:
        variant: which kernel.
        arch: as triton names it, "90" or "gfx942", or as on the command line, "sm_90".
        device: the GPU's name.
        numels: elements of the tensors that share the launch.
    """
    for size in (fingerprint(numels), size_class(numels)):
        found = _find(tuning_dir(), variant, arch_name(arch), device, size)
        if found.source == "user":
            return found.config
    return found.config


def find(variant: Variant, arch: str, device: str, size: str) -> Found:
    """The configuration of a size class, or of the fingerprint of a model's shapes, and why it is this one."""
    return _find(tuning_dir(), variant, arch_name(arch), device, size)


@lru_cache(maxsize=4096)
def _find(folder: Path, variant: Variant, arch: str, device: str, size: str) -> Found:
    if result := find_result(arch, device, variant, size):
        return Found(result[1].config, "user", f"{result[1].reason} ({result[0]})", result[1])
    candidates = [record for record in packaged(arch) if (record.variant, record.size) == (variant, size)]
    # The same GPU first, then what was measured on another of its architecture, then estimates.
    candidates.sort(key=lambda record: (record.device != device, record.basis == ESTIMATED))
    for record in candidates:
        return Found(record.config, "packaged", f"{record.basis}: {record.reason}", record)
    return Found(default_config(arch_key(arch)), "default", f"nothing is packaged for {arch}, {size}")


@cache
def packaged(arch: str) -> tuple[Record, ...]:
    """What this release ships for an architecture; stale measurements are left out."""
    path = Path(__file__).with_name(f"{slug(arch)}.json")
    if not path.is_file():
        return ()
    try:
        return tuple(record for record in read_bundle(path) if record.arch == arch and _is_usable(record))
    except (RecordError, OSError) as error:
        ignore(path, error)
        return ()


def _is_usable(record: Record) -> bool:
    """Whether the kernels are those that were measured; an estimate is tied to none."""
    try:
        check_current(record)
    except RecordError:
        return record.basis == ESTIMATED
    return True


def forget() -> None:
    """Read the files again at the next question: after a tuning run, and between tests."""
    _find.cache_clear()
    packaged.cache_clear()
