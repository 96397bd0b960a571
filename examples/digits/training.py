"""Train one small network with one optimizer, and keep what two such runs are compared by."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from examples.clock import timed

BATCH = 64
N_TEST = 360  # a fifth of the 1,797 images
WARM_UP_STEPS = 5  # not timed: they compile kernels and allocate the optimizer's state

BuildOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], float32 [n, 1, 8, 8], and their digits, int64 [n]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass(frozen=True)
class Run:
    """What one optimizer did."""

    losses: list[float]  # training loss of each step
    trajectory: torch.Tensor  # float32 [n_steps, n_parameters] on the CPU: all parameters after each step
    test_accuracy: float
    step_ms: float  # median of `optimizer.step()`

    def distance_to(self, other: "Run") -> torch.Tensor:
        """Return the largest difference of any parameter after each step, float32 [n_steps]."""
        return (self.trajectory - other.trajectory).abs().amax(dim=1)


def load(device: torch.device, seed: int = 0) -> Digits:
    """Return scikit-learn's handwritten digits, which it ships, shuffled and split."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(raw.images, dtype=torch.float32)[order, None].div(16).to(device)
    labels = torch.as_tensor(raw.target, dtype=torch.int64)[order].to(device)
    return Digits(images[N_TEST:], labels[N_TEST:], images[:N_TEST], labels[:N_TEST])


def build_network() -> torch.nn.Module:
    """Return a small convolutional network: ten parameter tensors of 10 to 36,864 elements.

    It is smooth on purpose. With ReLU and maximum pooling a parameter's last bit decides which gradients are
    zero: torch's own fused and for-loop Adam are 5e-2 apart after 345 steps; here 1.2e-7.
    """
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(512, 72),
        nn.SiLU(),
        nn.Linear(72, 10),
    )


def train(
    digits: Digits, build_optimizer: BuildOptimizer, n_epochs: int, seed: int, on_step: Callable[[], None]
) -> Run:
    """Train a fresh network; the same seed gives the same start and the same batches for any optimizer."""
    torch.manual_seed(seed)
    device = digits.train_images.device
    network = build_network().to(device)
    optimizer = build_optimizer(network.parameters())
    losses, trajectory, times = [], [], []
    for _ in range(n_epochs):
        for batch in torch.randperm(len(digits.train_labels)).split(BATCH):
            batch = batch.to(device)
            loss = cross_entropy(network(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            times.append(timed(optimizer.step, device))
            losses.append(loss.item())
            trajectory.append(parameters_to_vector(network.parameters()).detach().cpu())
            on_step()
    with torch.inference_mode():
        guesses = network(digits.test_images).argmax(dim=1)
    return Run(
        losses=losses,
        trajectory=torch.stack(trajectory),
        test_accuracy=(guesses == digits.test_labels).float().mean().item(),
        step_ms=statistics.median(times[WARM_UP_STEPS:] or times),
    )


def n_steps(digits: Digits, n_epochs: int) -> int:
    """Return the number of steps that `train` takes."""
    return n_epochs * -(-len(digits.train_labels) // BATCH)
