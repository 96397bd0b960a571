"""A GPT of two layers, and the text that it learns: the documentation that Python ships for `help()`."""

from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

CONTEXT = 64  # characters
N_CHARACTERS = 128
WIDTH = 64
N_HEADS = 4
N_LAYERS = 2


class Layer(nn.Module):
    """Attention to what came before, then a perceptron; each is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_heads, self.from_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return new features, [batch, length, WIDTH]."""
        query, key, value = (
            part.unflatten(2, (N_HEADS, -1)).transpose(1, 2) for part in self.to_heads(self.norm_1(x)).chunk(3, 2)
        )
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.from_heads(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.perceptron(self.norm_2(x))
        return y


class GPT(nn.Module):
    """Predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(N_CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(N_LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next character, [batch, length, N_CHARACTERS], for int64 [batch, length]."""
        x = self.characters(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the cross entropy of each next character, in nats, for int64 [batch, CONTEXT + 1]."""
    logits = model(windows[:, :-1]).float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@cache
def text() -> tuple[Tensor, Tensor]:
    """Return the characters to learn and those held out, the last tenth; int64 below N_CHARACTERS."""
    whole = "".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(whole.encode("ascii", "replace")), dtype=torch.uint8).long()
    border = len(data) * 9 // 10
    return data[:border], data[border:]


def windows_of(data: Tensor, n_windows: int, generator: torch.Generator) -> Tensor:
    """Return pieces of the text at random places, int64 [n_windows, CONTEXT + 1]."""
    starts = torch.randint(len(data) - CONTEXT, (n_windows, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)]
