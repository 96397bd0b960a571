"""What is measured: each case is data, and adding one is one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dragon.vm.measuring.shapes import Shapes, equal, gpt2, llama3, resnet50, vit_b


class Precision(NamedTuple):
    """Dtypes of a case: of parameters and gradients, and of the moments where the contender allows it."""

    name: str
    param: torch.dtype
    state: torch.dtype


FP32 = Precision("fp32", torch.float32, torch.float32)
BF16 = Precision("bf16", torch.bfloat16, torch.bfloat16)
MIXED = Precision("bf16 fp32-state", torch.bfloat16, torch.float32)
PRECISIONS = {precision.name: precision for precision in (FP32, BF16, MIXED)}


@dataclass(frozen=True)
class Case:
    """Tensors to update.

    Attributes:
        name: as on the command line and in the results.
        shapes: of the parameters.
        n_groups: parameter groups, each with a learning rate of its own.
        precisions: with which dtypes it is measured.
        chain: unscale, clip by the global norm and check for non-finite gradients before the update.
        amsgrad: keep the largest second moment, a third state.
        changing: half of the gradients are there, another half at each step, as with a mixture of experts.
        kept: gradients stay where they are, as after ``zero_grad(set_to_none=False)``.
        quick: part of the quick set.
        scaled: shapes of the model with this many layers; None for a case that cannot be scaled.
        n_layers, n_layers_of_model: how many it has, and how many the whole model has; 0 if it is none.
    """

    name: str
    shapes: Shapes
    n_groups: int = 1
    precisions: tuple[Precision, ...] = (FP32, BF16, MIXED)
    chain: bool = False
    amsgrad: bool = False
    changing: bool = False
    kept: bool = False
    quick: bool = False
    scaled: Callable[[int], Shapes] | None = None
    n_layers: int = 0
    n_layers_of_model: int = 0

    @property
    def numel(self) -> int:
        """Elements of all parameters together."""
        return sum(map(math.prod, self.shapes))

    def fit(self, max_numel: float) -> Case:
        """The case with as many of its layers as make at most `max_numel` elements.

        Raises:
            ValueError: if not even one layer fits, or the case has none.
        """
        if self.numel <= max_numel:
            return self
        if self.scaled is not None:
            for n_layers in range(self.n_layers - 1, 0, -1):
                smaller = replace(self, shapes=self.scaled(n_layers), n_layers=n_layers)
                if smaller.numel <= max_numel:
                    return smaller
        raise ValueError(f"{self.numel:,} parameters, but memory for {max(0, int(max_numel)):,}")


def model(name: str, scaled: Callable[[int], Shapes], n_layers: int, quick: bool = False) -> Case:
    """A model that loses layers until it fits the memory."""
    return Case(name, scaled(n_layers), scaled=scaled, n_layers=n_layers, n_layers_of_model=n_layers, quick=quick)


GPT2_124M = model("GPT-2 124M", lambda n_layers: gpt2(n_layers, 768), 12, quick=True)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("1000 x 1", equal(1000, 1), quick=True),
        Case("1000 x 1000", equal(1000, 1000), quick=True),
        Case("465 groups", equal(465, 1000), n_groups=465, quick=True),
        Case("chain, 1000 x 1000", equal(1000, 1000), chain=True, quick=True),
        Case("300 x 1000, changing", equal(300, 1000), changing=True, quick=True),
        Case("1 x 20M", equal(1, 20_000_000), quick=True),
        GPT2_124M,
        replace(GPT2_124M, name="chain, GPT-2 124M", chain=True),
        Case("1000 x 16", equal(1000, 16)),
        Case("10 x 16", equal(10, 16)),
        Case("1 x 1B", equal(1, 1_000_000_000)),
        Case("10000 x 1000", equal(10_000, 1000)),
        Case("amsgrad, 1 x 20M", equal(1, 20_000_000), precisions=(FP32,), amsgrad=True),
        model("GPT-2 1.5B", lambda n_layers: gpt2(n_layers, 1600), 48),
        model("Llama-3-8B", llama3, 32),
        Case("ResNet-50", resnet50()),
        Case("ViT-B", vit_b()),
    )
}
