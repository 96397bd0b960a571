"""Gradient accumulation: one launch adds every gradient to its sum, which stands in the table as the parameter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate_update(param, grad, states, scalars, SPEC: tl.constexpr):
    """Add a tile of a gradient to its sum."""
    return param + grad, states
