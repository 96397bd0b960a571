"""What a tuning run is about: which kernel variants, for which tensors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.kernels.inspect import UPDATES
from dragon.kernels.launch import Variant
from dragon.vm.tuning.sizes import CASES, Case, fingerprint

ALL = "all"

# Tuned without `--kernel`: what most training runs launch. The others are one `--kernel` away.
COMMON = (
    "adam fp32",
    "adam bf16",
    "adam bf16 fp32-state",
    "adam fp32 amsgrad",
    "sgd fp32 momentum",
    "accumulate fp32",
)

DTYPE_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class JobError(ValueError):
    """What was asked for does not exist; the text names what does."""


class Job(NamedTuple):
    """One search.

    Attributes:
        name: of the kernel variant, in words.
        variant: which kernel.
        case: its tensors.
    """

    name: str
    variant: Variant
    case: Case


def select_variants(kernel: str | None = None, dtype: str | None = None) -> dict[str, Variant]:
    """Kernel variants by name.

    Args:
        kernel: part of a name, "all" for every variant; None for `COMMON`.
        dtype: of the parameters, such as "bf16" or "bfloat16"; None for any.

    Raises:
        JobError: if there is none.
    """
    if kernel in ("norm", "reduction"):
        raise JobError(
            f"--kernel {kernel}: the reduction has nothing to tune, as its spans and threads set the order of its "
            "additions, and with it the last bits of a gradient norm"
        )
    dtype_name = None if dtype is None else DTYPE_NAMES.get(dtype, dtype.removeprefix("torch."))
    names = [name for name in UPDATES if kernel == ALL or kernel in name] if kernel else COMMON
    if kernel is None and dtype is not None:
        names = list(UPDATES)
    chosen = {name: UPDATES[name] for name in names if dtype_name in (None, UPDATES[name].param_dtype)}
    if not chosen:
        raise JobError(
            f"no kernel variant for --kernel {kernel or ALL!r} and --dtype {dtype or 'any'!r}; there are: "
            + ", ".join(UPDATES)
        )
    return chosen


def select_cases(names: Sequence[str]) -> list[Case]:
    """Cases by name, all without one.

    Raises:
        JobError: for an unknown name.
    """
    for name in names:
        if name not in CASES:
            raise JobError(f"--case {name!r} is unknown; there are: {', '.join(CASES)}")
    return [CASES[name] for name in names or CASES]


def plan_jobs(cases: Iterable[Case], variants: dict[str, Variant]) -> list[Job]:
    """Every variant on every case."""
    return [Job(name, variant, case) for name, variant in variants.items() for case in cases]


def plan_model_jobs(target: str, variants: dict[str, Variant]) -> list[Job]:
    """Every variant on the parameters of its dtype of a model.

    Args:
        target: "module:factory", a function without arguments that gives a module or its parameters.
        variants: by name.

    Raises:
        JobError: if there is no such function, or no variant fits its parameters.
    """
    by_dtype: dict[str, list[int]] = {}
    for param in _parameters(target):
        real = param.dtype.to_real() if param.is_complex() else param.dtype
        numel = param.numel() * (2 if param.is_complex() else 1)
        by_dtype.setdefault(str(real).removeprefix("torch."), []).append(numel)
    jobs = []
    for name, variant in variants.items():
        if numels := by_dtype.get(variant.param_dtype):
            jobs.append(Job(name, variant, Case(target, fingerprint(numels), tuple(numels))))
    if not jobs:
        raise JobError(
            f"--model {target}: no chosen kernel variant is for parameters of {', '.join(by_dtype) or 'none'}"
        )
    return jobs


def _parameters(target: str) -> list[Tensor]:
    module, _, attribute = target.partition(":")
    if not (module and attribute):
        raise JobError(f"--model wants module:factory, got {target!r}")
    # A console script does not look in the working directory; `python -m` does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise JobError(f"--model {target}: {error}") from None
    made = _build(factory)
    params = made.parameters() if isinstance(made, torch.nn.Module) else made
    return [param for param in params if param.requires_grad]


def _build(factory: Any) -> Any:
    """The model without memory for its parameters, of which only the shapes count, where it can be had so."""
    try:
        with torch.device("meta"):
            return factory()
    except (NotImplementedError, RuntimeError):
        # Some constructors read the values that they have just made.
        return factory()
