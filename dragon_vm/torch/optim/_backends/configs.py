"""Measured launch configurations: JSON files that ``dragon-vm tune`` writes and that the optimizer reads.

A file is data: it is parsed as JSON, its configuration is checked, and nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragon import kernels
from dragon.kernels.archs import warp_size
from dragon.kernels.config import LaunchConfig, default_config

if TYPE_CHECKING:
    from dragon.kernels.spec import Spec

FOLDER_VARIABLE = "DRAGON_VM_TUNING_DIR"
SCHEMA = 2

# Mean elements of a tensor that separate the size classes. Below the first, a tensor is a handful of chunks and a
# launch is about tables; from the second, bandwidth is all that counts.
SMALL, TRANSFORMER, LARGE = "small", "transformer", "large"
SMALL_BELOW = 2**14
LARGE_FROM = 2**23

EVICTIONS = ("", "evict_first", "evict_last")

# Characters of a part of a path; file systems end at 255 bytes.
LONGEST_NAME = 120

# Threads of a program that every GPU takes.
MOST_THREADS = 1024


class TuningWarning(UserWarning):
    """A tuning file is ignored."""


def config_for(spec: Spec, arch: str, device_name: str, numels: Sequence[int]) -> LaunchConfig:
    """The configuration to launch a kernel with: measured if there is a usable result, else the default.

    Files are read once for each distinct question. An unusable file is ignored with one warning. `arch` is as in
    "sm_90"; `numels` are the elements of the tensors that share the launch.
    """
    return _find(tuning_dir(), spec, arch, device_name, size_class(numels))


@lru_cache(maxsize=4096)
def _find(folder: Path, spec: Spec, arch: str, device_name: str, size: str) -> LaunchConfig:
    path = path_of(spec_fields(spec), arch, device_name, size, folder)
    try:
        return check_result(read_json(path), path)
    except (OSError, ValueError) as error:
        # False too where the user's folder cannot be searched: it may belong to another user, or be a file.
        if os.path.exists(path):
            warnings.warn(f"tuning file {path} is ignored: {error}", TuningWarning, stacklevel=3)
    return default_config(arch, spec)


def tuning_dir() -> Path:
    """The folder of results: DRAGON_VM_TUNING_DIR, or a folder in the user's cache."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache_home):
        cache_home = os.path.expanduser("~/.cache")
    return Path(cache_home, "dragon-vm", "tuning")


def size_class(numels: Sequence[int]) -> str:
    """The class of some tensors with these element counts, by their mean."""
    mean = sum(numels) / len(numels)
    if mean < SMALL_BELOW:
        return SMALL
    return TRANSFORMER if mean < LARGE_FROM else LARGE


def spec_fields(spec: Spec) -> dict[str, Any]:
    """The fields of a spec as JSON gives them back."""
    return {**asdict(spec), "states": list(spec.states)}


def path_of(spec: dict[str, Any], arch: str, device_name: str, size: str, folder: Path | None = None) -> Path:
    """The one file that can hold the result of a kernel, device and size class.

    `spec` has the fields of `spec_fields`. The folder of results is `tuning_dir` by default.
    """
    formats = [spec["param"], spec["grad"], *spec["states"]]
    average = [f"average {spec['average']}"] if spec["average"] else []
    zero_grad = ["zero_grad"] if spec["zero_grad"] else []
    name = file_name(" ".join(map(str, (spec["algorithm"], *formats, *average, *zero_grad, size))))
    return (folder or tuning_dir()) / file_name(arch) / file_name(device_name) / f"{name}.json"


def file_name(text: str) -> str:
    """The text as a short file name on any system."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")
    if name and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{name[: LONGEST_NAME - 17]}-{digest}".lstrip("-")


def read_json(path: Path) -> Any:
    """The content of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"not JSON: {error}") from None


def check_result(data: Any, path: Path | None = None) -> LaunchConfig:
    """The configuration of a result that is usable with the kernels of this release.

    A file must have the path for what its result is of; None is for data of another origin.

    Raises:
        ValueError: says why it is not usable.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise ValueError(f"it is no result of schema {SCHEMA}: its schema is {schema!r:.40}")
    if data.get("kernel_hash") != kernel_hash():
        raise ValueError("stale: the source of the kernels has changed since")
    try:
        arch, device_name, size = data["arch"], data["device"], data["size"]
        expected = path_of(data["spec"], arch, device_name, size, path.parents[2] if path else None)
        config = LaunchConfig(**data["config"])
        # What people are shown.
        times = data["best_ms"]["median"], data["default_ms"]["median"], data["copy_ms"]
        texts = data["kernel"], data["reason"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"incomplete: {type(error).__name__}: {error}") from None
    if path is not None and path != expected:
        raise ValueError("foreign: it is the result of something else than its name and folder say")
    if size not in (SMALL, TRANSFORMER, LARGE):
        raise ValueError(f"unknown size: {size!r:.40}")
    if not is_launchable(config, warp_size(arch)):
        raise ValueError(f"no kernel can be launched with {data['config']!r:.200}")
    for value in times:
        # An int may exceed every float.
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"incomplete: {value!r:.40} is no time")
    for value in texts:
        if not isinstance(value, str):
            raise ValueError(f"incomplete: {value!r:.40} is no text")
    return config


def is_launchable(config: LaunchConfig, n_lanes: int) -> bool:
    """Whether a configuration can be slow, but not wrong, where a warp has `n_lanes` threads."""

    def is_in(value: object, low: int, high: int, power_of_two: bool = False) -> bool:
        # A bool is an int to Python.
        return type(value) is int and low <= value <= high and not (power_of_two and value & (value - 1))

    return (
        is_in(config.n_warps, 1, MOST_THREADS // n_lanes, power_of_two=True)
        # The misaligned path takes an element a thread: more threads than elements would reach the next chunk.
        and is_in(config.chunk, max(128, n_lanes * config.n_warps), 2**16, power_of_two=True)
        and is_in(config.n_stages, 1, 8)
        and is_in(config.programs_per_processor, 0, 64)
        and config.eviction in EVICTIONS
    )


@cache
def kernel_hash() -> str:
    """A hash of the source of all kernels.

    Default configurations are no part of it: a change of them leaves measurements valid.
    """
    digest = hashlib.sha256()
    # The package may lie in an archive.
    for path in sorted(resources.files(kernels).iterdir(), key=attrgetter("name")):
        if path.name.endswith(".py") and path.name != "config.py":
            # In universal newlines, so that a checkout on another system has the same hash.
            digest.update(f"{path.name}\0{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()
