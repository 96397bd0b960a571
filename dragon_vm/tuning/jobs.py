"""Jobs of a tuning run: which kernels, for which tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dragon.kernels.inspect import UPDATES
from dragon.kernels.spec import Spec
from dragon.vm.measuring.shapes import gpt2
from dragon.vm.torch.optim._backends.configs import LARGE, SMALL, TRANSFORMER

# Tuned without `--kernel`: what most training runs launch.
COMMON = (
    "adam fp32",
    "adam bf16",
    "adam bf16 fp32-state",
    "adam fp32 amsgrad",
    "sgd fp32 momentum",
    "accumulate fp32",
)

# Elements of each tensor, by size class.
CASES = {
    LARGE: (2**27,),
    TRANSFORMER: tuple(map(math.prod, gpt2(12, 768))),
    SMALL: (1000,) * 1000,
}

# In triton's interpreter, which takes milliseconds a chunk.
REHEARSAL = (1000, 33)


class Job(NamedTuple):
    """One search.

    Attributes:
        name: of the kernel, in words.
        spec: which kernel.
        size: the size class that the result is for.
        numels: elements of each tensor.
    """

    name: str
    spec: Spec
    size: str
    numels: tuple[int, ...]


def select_specs(kernels: Sequence[str]) -> dict[str, Spec]:
    """Kernels by name: a whole name is that kernel alone, a part of names all that have it, "all" every one.

    Args:
        kernels: names or parts of names; none for `COMMON`.

    Raises:
        ValueError: for a name that no kernel has.
    """
    chosen: set[str] = set(() if kernels else COMMON)
    for text in kernels:
        if text in ("norm", "reduction"):
            raise ValueError(
                f"--kernel {text}: the reduction is not tuned, since its spans and threads set the order of its "
                "additions, and with it the last bits of a gradient norm"
            )
        found = [text] if text in UPDATES else [name for name in UPDATES if text == "all" or text in name]
        if not text or not found:
            raise ValueError(f"--kernel {text!r}: there is no such kernel; there are {', '.join(UPDATES)}")
        chosen.update(found)
    return {name: spec for name, spec in UPDATES.items() if name in chosen}


def plan_jobs(kernels: Sequence[str], sizes: Sequence[str], rehearsal: bool = False) -> list[Job]:
    """Every chosen kernel on every chosen case.

    Args:
        kernels: see `select_specs`.
        sizes: keys of `CASES`; none for all.
        rehearsal: take tiny tensors in their place.
    """
    specs = select_specs(kernels)
    cases = {size: REHEARSAL if rehearsal else CASES[size] for size in sizes or CASES}
    return [Job(name, spec, size, numels) for name, spec in specs.items() for size, numels in cases.items()]
