"""The contenders: what the weights are, and the options of the optimizer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dragon.vm.torch.optim import AdamW

LEARNING_RATE = 2e-3


class Mode(NamedTuple):
    """One way to keep weights and states.

    Attributes:
        optimizer: the class.
        dtype: of the weights that the network computes with.
        options: of the optimizer, beside the learning rate.
    """

    optimizer: type[torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = {}

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of a model."""
        arguments: dict[str, Any] = {"lr": LEARNING_RATE, **self.options}
        return self.optimizer(model.parameters(), **arguments)


REFERENCE = "torch"

MODES = {
    REFERENCE: Mode(torch.optim.AdamW),
    "ours": Mode(AdamW),
    "bf16-states": Mode(AdamW, options={"state_dtype": torch.bfloat16}),
    "8bit-states": Mode(AdamW, options={"state_dtype": "8bit"}),
    "split16": Mode(AdamW, torch.bfloat16, {"master_weights": "split16", "state_dtype": torch.bfloat16}),
    "split8-8bit": Mode(AdamW, torch.bfloat16, {"master_weights": "split8", "state_dtype": "8bit"}),
    "stochastic": Mode(AdamW, torch.bfloat16, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}),
    "torch-bf16": Mode(torch.optim.AdamW, torch.bfloat16),
}


def why_not(mode: Mode) -> str | None:
    """Return why the installed version cannot run a mode, or None if it can."""
    try:
        mode.build(torch.nn.Linear(1, 1, dtype=mode.dtype))
    # An option that is not known, and a value of an option that is not known.
    except (TypeError, ValueError) as error:
        return str(error)
    return None
