"""The algorithms by name: the update of a tile, and the scalars that it needs.

The branch is taken at compile time. The kernels call these functions by name, so Triton hashes their sources: an
edited update is compiled anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels.accumulate import accumulate_update
from dragon.kernels.adam import adam_scalars, adam_update
from dragon.kernels.sgd import sgd_scalars, sgd_update


@triton.jit
def update_by(param, grad, states, scalars, SPEC: tl.constexpr):
    """The new ``(param, states)`` of a tile: `states` is a tuple of tiles, `scalars` a tuple by column."""
    if SPEC.algorithm == "adam":
        return adam_update(param, grad, states, scalars, SPEC)
    elif SPEC.algorithm == "sgd":
        return sgd_update(param, grad, states, scalars, SPEC)
    else:
        tl.static_assert(SPEC.algorithm == "accumulate", "no such algorithm")
        return accumulate_update(param, grad, states, scalars, SPEC)


@triton.jit
def scalars_by(group, target, lr, step, ALGORITHM: tl.constexpr):
    """Write the scalars that only this algorithm's update reads."""
    if ALGORITHM == "adam":
        adam_scalars(group, target, lr, step)
    elif ALGORITHM == "sgd":
        sgd_scalars(group, target, lr, step)
    else:
        # A sum needs only the scalars of every algorithm, and these stay for all later launches.
        tl.static_assert(ALGORITHM == "accumulate", "no such algorithm")
