"""Device code: Triton kernels that update all tensors of a dtype in one launch.

It imports triton and the standard library.

A kernel takes pointers to the tables of `dragon.kernels.table` and compile-time constants. `dragon.kernels.launch`
starts it, and `dragon.kernels.inspect` shows what the compiler makes of it. Read `adam` (the maths), `update` (the
kernel), `tile`, `formats` and `table` in this order.
"""

from __future__ import annotations

from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.launch import advance_launcher, norm_launcher, update_launcher
from dragon.kernels.spec import Spec

__all__ = ["LaunchConfig", "Spec", "advance_launcher", "default_config", "norm_launcher", "update_launcher"]
