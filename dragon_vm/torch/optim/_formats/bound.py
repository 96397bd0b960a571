"""The largest first moment that a second moment allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.rounding import Plain

# More than a rounded fp32 moment exceeds its bound by, and less than 1e-5 of an update.
SLACK = 1 + 2.0**-18

# A bound above 1e27 bounds nothing, and soon is none in fp32.
_LARGEST_EXPONENT = 128


def moment_bound(beta1: float, beta2: float, step: float) -> float:
    """K such that |exp_avg| <= K sqrt(exp_avg_sq) after `step` steps of exact Adam.

    Cauchy-Schwarz on the sums that both moments are: K^2 = (1 - beta1)^2 / (1 - beta2) (1 + r + ... + r^(step-1))
    with r = beta1^2 / beta2, in float64. It holds for constant betas. A step takes K^2 to r K^2 and adds the term
    in front, so where betas change, the largest K of endless steps that they have had holds.

    `step` is at least 1, and infinite for a bound of any number of steps. So is the bound where there is none.
    """
    if beta2 == 0 and beta1 > 0 and step > 1:
        return math.inf
    ratio = beta1 * beta1 / beta2 if beta2 > 0 else 0.0
    if ratio == 0:
        terms = 1.0
    elif ratio == 1:
        terms = step
    else:
        # (r^t - 1) / (r - 1), which keeps its digits for r close to 1.
        exponent = step * math.log(ratio)
        terms = math.expm1(exponent) / (ratio - 1) if exponent < _LARGEST_EXPONENT else math.inf
    return (1 - beta1) * math.sqrt(terms / (1 - beta2))


def can_exceed_bound(states: Sequence[Format]) -> bool:
    """Whether a first moment among states that are stored so may exceed its bound by more than a rounding.

    It may if a state is in parts or rounded stochastically. So may one in fp16 beside another second moment: 0.9
    times four of the least numbers of fp16 are four of them again, and the second moment decays on.
    """
    is_stalling = len(states) > 1 and states[0] == Plain(torch.float16) != states[1]
    return is_stalling or not all(isinstance(form, Plain) for form in states)


def clamp_moment(exp_avg: Tensor, root: Tensor, bound: float) -> Tensor:
    """The first moment within `bound` times the root of the second.

    An exact first moment stays as it is. A stored one may exceed the bound, and its update is then larger than
    any of exact Adam.

    `exp_avg` and `root`, the square root of the new second moment, are fp32.
    """
    if math.isinf(bound):
        return exp_avg
    limit = root * rounded_bound(bound)
    return torch.copysign(torch.minimum(exp_avg.abs(), limit), exp_avg)


def rounded_bound(bound: float) -> float:
    """The bound as the fp32 number that a moment is compared with, a little above: rounding alone is not cut."""
    return float(torch.tensor(bound * SLACK, dtype=torch.float32, device="cpu"))
