"""The native backend of tensors that torch's fused operations do not take: the eager maths, in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dragon.vm.torch.optim._algorithms.algorithm import Algorithm
from dragon.vm.torch.optim._backends.selection import Gathered, picker
from dragon.vm.torch.optim._backends.stored import StoredUpdate
from dragon.vm.torch.optim._gradients.scaling import Factors
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._options import Version

# Elements of a piece, of which four threads take a part in each operation: PyTorch gives a thread 32,768 or more.
# Half as many leave the caches to fewer bytes, and still cost a tenth more: an operation takes 1 us to start.
PIECE = 2**17


class PiecewiseGroup:
    """One flattened group on the CPU, decoded and updated a piece at a time.

    torch's fused operation rounds otherwise than the kernels do; its parameters would differ in their last bits.

    Args:
        group: the tensors.
        algorithm: what is computed.
        n_gathered: how many tensors a step gathers.
        seed: of random words.
    """

    def __init__(self, group: FlattenedGroup, algorithm: Algorithm, n_gathered: int, seed: int) -> None:
        self.pick = picker([entry.position for entry in group.entries], n_gathered)
        self._stored = StoredUpdate(group, algorithm, seed, PIECE)

    def update(
        self,
        tensors: Gathered,
        grads: Sequence[Tensor | None],
        groups: Sequence[dict[str, Any]],
        version: Version,
        factors: Factors,
    ) -> None:
        """Update the tensors.

        Args:
            tensors: all that the step gathered.
            grads: this group's gradients; None for a parameter that takes no part.
            groups: all parameter groups of the optimizer.
            version: of their hyperparameters; unused, since nothing is kept from step to step.
            factors: of the gradients.
        """
        self._stored.update(tensors, grads, groups, factors)
