"""Device code: Triton kernels that update every tensor of a model in one launch. Imports triton and nothing else.

A kernel takes pointers to the tables of `dragon.kernels.table` and compile-time constants; `dragon.kernels.launch`
starts it, and `dragon.kernels.inspect` shows what the compiler makes of it.
"""

from __future__ import annotations

from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.launch import Variant, launch_advance, launch_norm, launch_update

__all__ = ["LaunchConfig", "Variant", "default_config", "launch_advance", "launch_norm", "launch_update"]
