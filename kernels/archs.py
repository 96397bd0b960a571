"""Names of GPU architectures: the one place that knows how they are written and what follows from a name."""

from __future__ import annotations

import re

# What is compiled and checked by default: Ampere, Hopper and Blackwell of NVIDIA, CDNA 3 of AMD.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")

# NVIDIA's architectures that compute in float64 at half the speed of float32; of all others it is 1/32 or less:
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions
_FAST_FLOAT64 = (60, 70, 72, 80, 90, 100)


def arch_name(arch: str | int) -> str:
    """The name in files and on the command line: "sm_90" for triton's 90 or "90", and "gfx942" as it is."""
    return f"sm_{arch}" if re.fullmatch(r"\d+", str(arch)) else str(arch)


def check_arch(arch: str) -> str:
    """The name itself.

    Raises:
        ValueError: the name is not written like "sm_90" or "gfx942".
    """
    if not re.fullmatch(r"sm_\d+|gfx(?:9|1)[0-9a-f]+", arch):
        raise ValueError(f'arch: expected a name like "sm_90" or "gfx942", got {arch!r}')
    return arch


def compute_capability(arch: str) -> int | None:
    """90 for "sm_90"; None for an architecture that is not NVIDIA's."""
    return int(arch.removeprefix("sm_")) if arch.startswith("sm_") else None


def warp_size(arch: str) -> int:
    """Threads of a warp: 64 on GCN and CDNA, else 32."""
    return 64 if arch.startswith("gfx9") else 32


def sum_dtype(arch: str) -> str:
    """The dtype in which `norm_kernel` sums squares: "float32" where float64 takes longer than reading gradients.

    That is so on NVIDIA's consumer GPUs and sm_103, and on AMD's RDNA. Names of other kinds mean "float64".
    """
    capability = compute_capability(arch)
    is_slow = arch.startswith("gfx1") if capability is None else capability not in _FAST_FLOAT64
    return "float32" if is_slow else "float64"
