"""The part of a step that decides on the host: about scaling, clipping and skipping."""

from __future__ import annotations

import math

import torch

from dragon.vm.torch.optim._backends.host import HostGroup
from dragon.vm.torch.optim._backends.native import NativeGroup
from dragon.vm.torch.optim._backends.selection import Gathered
from dragon.vm.torch.optim._gradients.norms import SquareSum
from dragon.vm.torch.optim._gradients.scaling import Factors, Scaling, gradient_factors
from dragon.vm.torch.optim._gradients.shared_norm import Reductions, SharedNorm
from dragon.vm.torch.optim._gradients.zeroing import apart
from dragon.vm.torch.optim._groups.checks import has_memory
from dragon.vm.torch.optim._groups.flattening import FlattenedGroup
from dragon.vm.torch.optim._options import needs_norm
from dragon.vm.torch.optim._plan.preparation import Prepared
from dragon.vm.torch.optim._plan.recipe import Outcome, Recipe


class HostStep:
    """The flattened groups that are updated by torch operations, and decisions for all groups of a plan.

    Attributes:
        groups: host groups.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared, n_gathered: int) -> None:
        hosts = [group for group in prepared.flattened if group.signature.backend != "triton"]
        self.groups = [_on_host(recipe, group, n_gathered) for group in hosts]
        # In the order of the parameters: a norm's last bits depend on it, and on nothing else of the plan.
        self._positions, _, _, _, self._group_index = prepared.chosen
        # What sums the squares of the gradients that the last step had, and their positions.
        self._square_sum: tuple[list[int], SquareSum] = [], SquareSum([])
        self._clips_each = any(group["clip_norm"] for group in recipe.groups)
        # Whether some group scales its gradients, and the version of which that was asked.
        self._scales, self._read_for = False, 0
        self._shared: tuple[Reductions, list[int], SharedNorm] | None = None

    def run(self, recipe: Recipe, tensors: Gathered, kept_scale: float | None) -> tuple[Outcome, Scaling]:
        """Decide, and update the host groups.

        Returns:
            The outcome, and the decision as the scaling of kernels.
        """
        groups, version, scaling = recipe.groups, recipe.version, recipe.scaling
        is_scaled = scaling.grad_scale is not None or scaling.found_inf is not None
        decides = is_scaled or self._clips_each or needs_norm(recipe.settings)
        factors = self._factors(recipe, tensors, kept_scale) if decides else Factors(kept_scale=kept_scale)
        if factors.skip:
            return Outcome(factors.norm, 1), Scaling()
        if version[0] != self._read_for:
            self._scales, self._read_for = any(group["grad_scale"] != 1 for group in groups), version[0]
        if decides or self._scales:
            # A gradient may be written to after it was read: no two may be the same memory.
            tensors = tensors._replace(grads=apart(tensors.grads, self._present(tensors)))
        for member in self.groups:
            member.update(tensors, groups, version, factors)
        if factors.common == 1:
            return Outcome(factors.norm), Scaling()
        # Kernels divide by a loss scale; a norm of infinity leaves a factor of 0.
        divisor = 1 / factors.common if factors.common else math.inf
        return Outcome(factors.norm), Scaling(torch.tensor([divisor], dtype=torch.float64, device="cpu"))

    def shared(self, recipe: Recipe, tensors: Gathered) -> SharedNorm | None:
        """Sums over the processes that share the gradients of a step; None if there are no others."""
        reductions = recipe.reductions
        if reductions is None:
            return None
        positions = self._present(tensors)
        if self._shared is None or self._shared[0] is not reductions or self._shared[1] != positions:
            chosen = [self._positions[position] for position in positions]
            self._shared = reductions, positions, SharedNorm(reductions, chosen, len(recipe.members.params))
        return self._shared[2]

    def _present(self, tensors: Gathered) -> list[int]:
        """Positions of the gradients that are there, in the order of the parameters."""
        return [position for position, grad in enumerate(tensors.grads) if grad is not None]

    def _factors(self, recipe: Recipe, tensors: Gathered, kept_scale: float | None) -> Factors:
        """Decide.

        Raises:
            ValueError: for gradients whose numbers cannot be read. No step has been counted then.
        """
        positions, settings = self._present(tensors), recipe.settings
        walked = [tensors.grads[position] for position in positions]
        indices = [self._group_index[position] for position in positions]
        shared = self.shared(recipe, tensors)
        try:
            if needs_norm(settings) and self._square_sum[0] != positions:
                self._square_sum = positions, SquareSum(walked)
            sums = self._square_sum[1], shared
            factors = gradient_factors(walked, indices, recipe.groups, settings, recipe.scaling, *sums)
        except RuntimeError as error:
            opaque = next((grad for grad in walked if not has_memory(grad)), None)
            if opaque is None:
                raise
            raise ValueError(
                "max_grad_norm, clip_norm, skip_nonfinite and a GradScaler need numbers that can be read, but a "
                f"gradient is of type {type(opaque).__name__} on {opaque.device}: {error}"
            ) from error
        each = factors.each
        if each:
            own = dict(zip(positions, each, strict=True))
            each = [own.get(position, 1.0) for position in range(len(self._positions))]
        return factors._replace(each=each, kept_scale=kept_scale)


def _on_host(recipe: Recipe, group: FlattenedGroup, n_gathered: int) -> NativeGroup | HostGroup:
    is_native, signature = group.signature.backend == "native", group.signature
    # Torch's fused operations take gradients of the parameter's dtype, to which wider ones would be rounded. They
    # do not know the dtypes of one byte.
    itemsize = signature.param_dtype.itemsize
    takes_grads = itemsize >= 4 or (itemsize == 2 and signature.grad_dtype == signature.param_dtype)
    if is_native and signature.is_uniform and takes_grads:
        return NativeGroup(group, recipe.algorithm, n_gathered)
    return HostGroup(group, recipe.algorithm, n_gathered, recipe.settings.rounding_seed, in_pieces=is_native)
