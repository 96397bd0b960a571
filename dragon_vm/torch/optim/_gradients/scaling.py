"""What happens to the gradients before an update, in torch operations: unscale, clip, check.

The triton backend does the same inside its kernels; see `dragon.kernels.norm` and `dragon.kernels.advance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.placement import placed_like
from dragon.vm.torch.optim._distributed.reduction import meeting_device
from dragon.vm.torch.optim._distributed.shards import is_distributed
from dragon.vm.torch.optim._gradients.norms import SquareSum, norms_of
from dragon.vm.torch.optim._gradients.shared_norm import Reductions, SharedNorm
from dragon.vm.torch.optim._options import Settings, needs_norm

# `torch.nn.utils.clip_grad_norm_` divides by the norm plus this.
CLIP_EPS = 1e-6


class Scaling(NamedTuple):
    """What a `GradScaler` hands to an optimizer.

    Attributes:
        grad_scale: fp32 [1], gradients are divided by it; None for 1. A decision of the host's is fp64.
        found_inf: fp32 [1], positive if the step is to be skipped; None for 0.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def handed_over(optimizer: object) -> Scaling:
    """What a `GradScaler` has set on an optimizer for this step; a finding is one for all processes."""
    scale, found_inf = map(vars(optimizer).get, ("grad_scale", "found_inf"))
    if not isinstance(found_inf, Tensor):
        # None, or the 0 that stands for no gradient.
        return Scaling(scale)
    if is_distributed(found_inf):
        found_inf = placed_like(torch.zeros((), device="cpu"), found_inf)
    return Scaling(scale, found_inf)


class Factors(NamedTuple):
    """What to do with the gradients of one step.

    Attributes:
        skip: leave parameters, states and counters alone.
        common: what all gradients are multiplied by, beside their groups' own factors.
        each: what each gradient is multiplied by in addition; empty for 1.
        norm: the norm of all gradients together, float64 0-dim; None if nothing asked for it.
        kept_scale: what the gradients are divided by that stay behind: 1 to leave them as they are; None if nobody
            reads them any more.
    """

    skip: bool = False
    common: float = 1.0
    each: Sequence[float] = ()
    norm: Tensor | None = None
    kept_scale: float | None = 1.0

    def of(self, index: int, group: dict[str, Any]) -> float:
        """The factor of a gradient by its position and group; negative to maximise."""
        factor = group_factor(group) * self.common
        return factor * self.each[index] if self.each else factor


def group_factor(group: dict[str, Any]) -> float:
    """The factor of a group's gradients: its `grad_scale`, negative to maximise."""
    scale = float(group["grad_scale"])
    return -scale if group["maximize"] else scale


def gradient_factors(
    grads: Sequence[Tensor],
    group_index: Sequence[int],
    groups: Sequence[dict[str, Any]],
    settings: Settings,
    scaling: Scaling,
    square_sum: SquareSum,
    shared: SharedNorm | None,
) -> Factors:
    """Decide by what each gradient is multiplied, and whether the step is skipped.

    The scaling is read, which synchronises on an accelerator. `square_sum` is that of gradients like these, if a
    norm is asked for. `shared` is None where no other process has parts of them.
    """
    limits = [float(group["clip_norm"]) for group in groups]
    skip = scaling.found_inf is not None and float(scaling.found_inf) > 0
    scale = 1.0 if scaling.grad_scale is None else float(scaling.grad_scale)
    # A scale that underflowed to 0 leaves nothing finite, as a division by it would.
    common = 1.0 / scale if scale else math.inf
    norm, norms = None, None
    if shared is not None:
        norms, total, skip = _shared_norms(grads, group_index, groups, settings, scaling, shared)
    elif needs_norm(settings):
        total = total_norm(grads, group_index, groups, settings.norm_type, square_sum)
    if needs_norm(settings):
        total *= common
        norm = torch.tensor(total, dtype=torch.float64, device="cpu")
        skip |= settings.skip_nonfinite and not math.isfinite(total)
        common *= _clip_factor(total, settings.max_grad_norm, CLIP_EPS)
    each: list[float] = []
    if any(limits) and not skip:
        if norms is None:
            norms = norms_of(grads, 2).tolist()
        each = [
            _clip_factor(norm_of * abs(group_factor(groups[index]) * common), limits[index], 0.0)
            for norm_of, index in zip(norms, group_index, strict=True)
        ]
    return Factors(skip, common, each, norm)


def _shared_norms(
    grads: Sequence[Tensor],
    group_index: Sequence[int],
    groups: Sequence[dict[str, Any]],
    settings: Settings,
    scaling: Scaling,
    shared: SharedNorm,
) -> tuple[list[float] | None, float, bool]:
    """Norms over all processes, of each gradient if some group clips them so and of all, and whether to skip."""
    numbers = [abs(group_factor(groups[index])) for index in group_index]
    factors, device = torch.tensor(numbers, dtype=torch.float64, device="cpu"), meeting_device(grads)
    if device.type == "cpu":
        # Other processes may have gradients of parameters that are elsewhere.
        device = shared.device
    largest = settings.norm_type == math.inf
    # Times the factors, as kernels of other processes sum them.
    measured = norms_of(grads, settings.norm_type) * factors
    squares = (measured if largest else measured.square()).to(device)
    sums, flag = shared.reduce(squares, scaling.found_inf, largest=largest, skip_nonfinite=settings.skip_nonfinite)
    norms = (sums if largest else sums.sqrt()).cpu()
    if not shared.is_of_each:
        return None, float(norms), float(flag) > 0
    return (norms / factors).tolist(), float(torch.linalg.vector_norm(norms)), float(flag) > 0


def take_part(
    reductions: Reductions, params: Sequence[Tensor], settings: Settings, scaling: Scaling
) -> tuple[Tensor | None, Tensor]:
    """Take part in the sums of a step for which this process has no gradient, without waiting for a device.

    Returns:
        The norm of all gradients, float64 0-dim; None if nothing asked for it.
        1 for a skipped step, else 0; int64 0-dim.
    """
    largest = settings.norm_type == math.inf
    # With `clip_norm` the sums of all tensors are asked for, else their total.
    positions = range(len(params) if reductions.each is not None else 0)
    device = meeting_device(params, settings.process_group)
    none = torch.zeros(len(positions), dtype=torch.float64, device=device)
    sums, flag = SharedNorm(reductions, positions, len(params)).reduce(
        none, scaling.found_inf, largest=largest, skip_nonfinite=settings.skip_nonfinite
    )
    scale = 1.0 if scaling.grad_scale is None else scaling.grad_scale.to(device).double().reshape(())
    norm = (sums.sum() if largest else sums.sum().sqrt()) / scale
    skipped = (flag > 0).reshape(()) | (torch.isfinite(norm).logical_not() & settings.skip_nonfinite)
    return norm if needs_norm(settings) else None, skipped.long()


def zero_norm(norm: Tensor | None, params: Sequence[Tensor]) -> Tensor:
    """The norm of a step without gradients, float64 0-dim. `norm` is that of the step before it, or None."""
    # A graph of an earlier step writes to its norm at each replay. It has none that inference mode made.
    if norm is not None and not norm.is_inference():
        return norm.zero_()
    return torch.zeros((), dtype=torch.float64, device=meeting_device(params))


@torch.no_grad()
def total_norm(
    grads: Sequence[Tensor],
    group_index: Sequence[int],
    groups: Sequence[dict[str, Any]],
    norm_type: float,
    square_sum: SquareSum,
) -> float:
    """The norm of gradients together, each times its group's factor, of type 2 or infinity.

    `square_sum` is that of gradients like these.
    """
    if norm_type == math.inf:
        factors = [abs(group_factor(groups[index])) for index in group_index]
        return float((norms_of(grads, norm_type) * torch.tensor(factors, dtype=torch.float64, device="cpu")).max())
    squares = [group_factor(group) ** 2 for group in groups]
    if len(set(squares)) == 1:
        return math.sqrt(squares[0] * square_sum(grads))
    members: dict[float, list[Tensor]] = {}
    for grad, index in zip(grads, group_index, strict=True):
        members.setdefault(squares[index], []).append(grad)
    return math.sqrt(sum(square * SquareSum(chosen)(chosen) for square, chosen in members.items()))


def _clip_factor(norm: float, limit: float, eps: float) -> float:
    """Limit / (norm + eps), at most 1; 1 without a limit. NaN for a NaN norm, or if both are infinite."""
    if not limit or norm + eps == 0:
        return 1.0
    factor = limit / (norm + eps)
    return 1.0 if factor > 1 else factor


def clip_value(group: dict[str, Any]) -> float:
    """The bound of a group's gradient elements; 0 for none. `clip_norm` overrides it."""
    bound = float(group["clip_value"])
    return 0.0 if group["clip_norm"] or bound == math.inf else bound
