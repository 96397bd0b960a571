"""Cases as data: small printable records from which the tensors of a parity run are built.

Values come from (seed, binade, shape), so that Hypothesis shrinks three integers and not a thousand floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fence import Fenced

DENSE_LAYOUTS = ("contiguous", "transposed", "channels_last", "permuted", "misaligned")
LAYOUTS = (*DENSE_LAYOUTS, "non_dense")
TENSOR_LAYOUTS = (*LAYOUTS, "scalar")
GRADIENT_LAYOUTS = ("same", "contiguous", "reversed", "misaligned", "non_dense", "expanded")

# Order of the dimensions in memory, slowest first.
_MEMORY_ORDER = {"transposed": (1, 0), "channels_last": (0, 2, 3, 1), "permuted": (1, 2, 0)}


def check_layouts(name: str, layouts: Iterable[str], known: Sequence[str]) -> None:
    """Check that layouts are known: any other would be built as if it were another.

    Raises:
        ValueError: A layout that is not known, by name.
    """
    unknown = [layout for layout in layouts if layout not in known]
    if unknown:
        raise ValueError(f"{name}: no layout {', '.join(map(repr, unknown))}; known are {', '.join(known)}")


def _smallest_factor(number: int) -> int:
    """Return the smallest prime factor, or `number` itself below 2."""
    return next((n for n in range(2, math.isqrt(max(number, 0)) + 1) if number % n == 0), number)


def _strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions lie in memory in this order, slowest first."""
    return torch.empty_permuted(shape, order, device="meta").stride()


def _fenced(values: Tensor, strides: tuple[int, ...], layout: str, device: str) -> Fenced:
    """Put values into a fence with these strides: twice as far apart or misaligned, if the layout is."""
    if layout == "non_dense":
        strides = tuple(2 * stride for stride in strides)
    misalign = int(layout == "misaligned")
    fenced = Fenced(values.shape, strides=strides, dtype=values.dtype, device=device, misalign=misalign)
    fenced.tensor.copy_(values)
    return fenced


def random_values(seed: int, binade: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return normal numbers times 2**binade, computed in float64 and rounded once; contiguous, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    wide_dtype = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, generator=generator, dtype=wide_dtype) * 2.0**binade).to(dtype)


@dataclass(frozen=True)
class TensorCase:
    """A parameter to build: `numel` elements of about 2**binade in one of `LAYOUTS`, or a 0-dim "scalar"."""

    seed: int
    binade: int
    numel: int
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_layouts("layout", [self.layout], TENSOR_LAYOUTS)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor: as many dimensions as the layout needs, from the smallest factors of numel."""
        if self.layout == "scalar":
            return ()
        first = _smallest_factor(self.numel)
        rest = self.numel // first if first else 1
        if self.layout == "transposed":
            return (first, rest)
        second = _smallest_factor(rest)
        if self.layout == "permuted":
            return (first, second, rest // second)
        return (1, first, second, rest // second) if self.layout == "channels_last" else (self.numel,)

    def build(self, device: str = "cpu") -> Fenced:
        """Build the tensor inside a fence on `device`."""
        shape = self.shape
        order = _MEMORY_ORDER.get(self.layout, tuple(range(len(shape))))
        values = random_values(self.seed, self.binade, shape, self.dtype)
        return _fenced(values, _strides(shape, order), self.layout, device)


@dataclass(frozen=True)
class GradientCase:
    """A gradient to build for a parameter: about 2**binade, or zeros, in one of `GRADIENT_LAYOUTS`.

    "same" has the parameter's strides, "reversed" the opposite order of dimensions in memory; "expanded" is one
    number with zero strides, as a sum's backward makes it.
    """

    seed: int
    binade: int
    zeros: bool = False
    layout: str = "same"
    dtype: torch.dtype | None = None  # None is the parameter's

    def __post_init__(self) -> None:
        check_layouts("layout", [self.layout], GRADIENT_LAYOUTS)

    def build(self, param: Tensor) -> Fenced:
        """Build the gradient of `param` inside a fence on its device."""
        shape, dtype = tuple(param.shape), self.dtype or param.dtype
        device = str(param.device)
        if self.layout == "expanded":
            value = random_values(self.seed, self.binade, (), dtype) * (not self.zeros)
            fenced = Fenced(shape, strides=(0,) * len(shape), dtype=dtype, device=device)
            fenced.tensor[(slice(0, 1),) * len(shape)] = value
            return fenced
        values = random_values(self.seed, self.binade, shape, dtype) * (not self.zeros)
        strides = param.stride()
        if self.layout != "same":
            dims = tuple(range(len(shape)))
            fastest_first = tuple(sorted(dims, key=param.stride().__getitem__))
            strides = _strides(shape, fastest_first if self.layout == "reversed" else dims)
        return _fenced(values, strides, self.layout, device)


@dataclass(frozen=True)
class GroupCase:
    """One parameter group: its tensors, and the hyperparameters that it sets itself."""

    tensors: tuple[TensorCase, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class StepCase:
    """One call of `step`.

    Attributes:
        gradients: One entry for each parameter of the case in order; None is a parameter without gradient.
        lr: New learning rate by group index, set before the step as a scheduler would.
        reload: Go on, before the step, with a fresh optimizer that has loaded the old one's `state_dict()`.
        count: What step counters are set to before the step, as in a long run, after a reload; None to leave them.
    """

    gradients: tuple[GradientCase | None, ...]
    lr: dict[int, float]
    reload: bool = False
    count: int | None = None


@dataclass(frozen=True)
class OptimizerCase:
    """One run of an optimizer: arguments of its constructor, parameter groups, and steps."""

    options: dict[str, Any]
    groups: tuple[GroupCase, ...]
    steps: tuple[StepCase, ...]

    @property
    def tensors(self) -> tuple[TensorCase, ...]:
        """All tensors of all groups in order."""
        return tuple(tensor for group in self.groups for tensor in group.tensors)
