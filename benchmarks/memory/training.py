"""Two small trainings: handwritten digits by a perceptron, the text of Python's library by a transformer."""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import typing
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.memory.modes import Mode, Trained, trained

CONTEXT = 48


class Outcome(NamedTuple):
    """What a training led to.

    Attributes:
        losses: of each step.
        final: loss at the end, in nats: of digits on all training images, of text on text that was held out.
    """

    losses: list[float]
    final: float


def _start(network: nn.Module, mode: Mode) -> Trained:
    """The optimizer of a network that starts, in every mode, from weights that bf16 holds."""
    with torch.no_grad():
        for param in network.parameters():
            param.copy_(param.bfloat16())
    return trained(network.parameters(), mode)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images in [0, 1], float32 [n, 64], and their digits."""
    raw = load_digits()
    return torch.tensor(raw.data / 16).float(), torch.tensor(raw.target)


def train_digits(mode: Mode, seed: int, steps: int = 800) -> Outcome:
    """A 64-256-256-10 perceptron with a learning rate of 1e-3, in batches of 64."""
    images, labels = digits()
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )  # fmt: skip
    optimizer = _start(network, mode)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        loss = cross_entropy(network(images[batch]), labels[batch])
        loss.backward()
        optimizer.step(1e-3)
        losses.append(loss.item())
    with torch.no_grad():
        final = cross_entropy(network(images), labels).item()
    return Outcome(losses, final)


@cache
def text() -> Tensor:
    """Source text of modules that every Python has, as bytes below 128."""
    source = "".join(inspect.getsource(module) for module in (argparse, logging, inspect, typing))
    return torch.tensor(list(source.encode("ascii", "replace")))


class Transformer(nn.Module):
    """A character model of two layers of width 64 with four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.positions = nn.Parameter(torch.randn(CONTEXT, 64) * 0.02)
        layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, [batch, CONTEXT, 128]."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        hidden = self.layers(self.embedding(tokens) + self.positions, mask=mask, is_causal=True)
        return typing.cast(Tensor, self.head(hidden))


def _batch(data: Tensor, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator)
    windows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def _text_loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = batch
    return cross_entropy(network(tokens).flatten(0, 1), targets.flatten())


def _rate(step: int, steps: int) -> float:
    """A learning rate that grows for 30 steps to 2e-3, and shrinks to 0 as a cosine does.

    With a constant rate final losses scatter by several 0.001 nats, whatever is rounded where.
    """
    return 1e-3 * min(1.0, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps))


def train_text(mode: Mode, seed: int, steps: int = 500) -> Outcome:
    """`Transformer` in batches of 6; the last tenth of the text is held out."""
    data = text()
    border = len(data) * 9 // 10
    torch.manual_seed(seed)
    network = Transformer()
    optimizer = _start(network, mode)
    losses = []
    for step in range(steps):
        loss = _text_loss(network, _batch(data[:border], 6))
        loss.backward()
        optimizer.step(_rate(step, steps))
        losses.append(loss.item())
    with torch.no_grad():
        held_out = _batch(data[border:], 512, torch.Generator().manual_seed(0))
        final = _text_loss(network, held_out).item()
    return Outcome(losses, final)


TRAININGS: dict[str, Callable[[Mode, int], Outcome]] = {"digits": train_digits, "text": train_text}
