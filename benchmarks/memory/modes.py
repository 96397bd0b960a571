"""What is compared: the memory modes of this library, and models of what peers store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from benchmarks.memory.peers import Dynamic, Float8, LinearRoot, Moments, PeerAdam, Softsign
from dragon.vm.torch.optim import Adam

BETAS = (0.9, 0.999)
FP32, BF16 = torch.float32, torch.bfloat16


class Mode(NamedTuple):
    """How a model is trained.

    Attributes:
        dtype: of the parameters.
        options: of this library's Adam.
        peer: formats of both moments in the place of this library.
    """

    dtype: torch.dtype = FP32
    options: Mapping[str, Any] = {}
    peer: Moments | None = None


MODES = {
    "fp32": Mode(),
    "bf16 states": Mode(FP32, {"state_dtype": BF16}),
    "bf16 states to nearest": Mode(FP32, {"state_dtype": BF16, "stochastic_rounding": False}),
    "8bit": Mode(FP32, {"state_dtype": "8bit"}),
    "split16": Mode(BF16, {"master_weights": "split16", "state_dtype": FP32}),
    "split8, bf16 states": Mode(BF16, {"master_weights": "split8", "state_dtype": BF16}),
    "split8, 8bit": Mode(BF16, {"master_weights": "split8", "state_dtype": "8bit"}),
    "bf16 stochastic, bf16 states": Mode(BF16, {"stochastic_rounding": True, "state_dtype": BF16}),
    "bf16 stochastic, 8bit": Mode(BF16, {"stochastic_rounding": True, "state_dtype": "8bit"}),
    "bf16 to nearest": Mode(BF16, {"state_dtype": FP32}),
    "FlashOptim's": Mode(peer=Moments(Softsign(), LinearRoot())),
    "bitsandbytes'": Mode(peer=Moments(Dynamic(True), Dynamic(False))),
    "e4m3": Mode(peer=Moments(Float8(), Float8())),
}
OURS = [name for name, mode in MODES.items() if mode.peer is None]


class Trained(Protocol):
    """An optimizer of parameters that a network computes with."""

    def step(self, lr: float) -> None:
        """Step with the gradients that the parameters have, and drop them."""

    def second_moment(self) -> Tensor:
        """exp_avg_sq of the first parameter, fp32."""

    def nbytes(self) -> int:
        """Bytes of parameters and states, step counters left out."""


class Ours:
    """This library's Adam. The network computes in fp32 with the numbers that the parameters hold."""

    def __init__(self, shown: Iterable[Tensor], mode: Mode) -> None:
        self._shown = list(shown)
        self._params: list[Tensor] = [nn.Parameter(param.detach().to(mode.dtype)) for param in self._shown]
        # The versions of what the network's parameters were given.
        self._given = [param._version for param in self._shown]
        if mode.dtype != FP32:
            for param in self._params:
                param.grad_dtype = FP32
        with warnings.catch_warnings():
            # Second moments to nearest, on purpose.
            warnings.filterwarnings("ignore", message=".*stochastic_rounding")
            self._adam = Adam(self._params, betas=BETAS, backend="native", **mode.options)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Step with the gradients that the network's parameters have, and drop them."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for param, shown, given in zip(self._params, self._shown, self._given, strict=True):
            # What the network's parameter has become since the last step, the optimizer has to know.
            if shown._version != given:
                param.copy_(shown)
            param.grad, shown.grad = shown.grad, None
        self._adam.step()
        torch._foreach_copy_(self._shown, self._params)
        self._given = [param._version for param in self._shown]
        for param in self._params:
            param.grad = None

    def second_moment(self) -> Tensor:
        """exp_avg_sq of the first parameter, fp32."""
        found: Tensor = self._adam.state_dict()["state"][0]["exp_avg_sq"]
        return found

    def nbytes(self) -> int:
        """Bytes of parameters and states."""
        kept = self._adam.memory()
        return kept["parameters"] + kept["states"] + kept["masters"]


def trained(params: Iterable[Tensor], mode: Mode) -> Trained:
    """The optimizer of a network's fp32 parameters, which it sees in the dtype of the mode."""
    return Ours(params, mode) if mode.peer is None else PeerAdam(params, mode.peer, BETAS)
