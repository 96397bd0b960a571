"""Arithmetic with a stated rounding error, in float32 or float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(numerator, denominator):
    """Correctly rounded quotient, in fp32 or fp64."""
    # One expression: what follows an early `return` is compiled too, and div_rn takes no fp64.
    return numerator / denominator if denominator.dtype == tl.float64 else tl.div_rn(numerator, denominator)


@triton.jit
def square_root(tile):
    """Correctly rounded square root, in fp32 or fp64."""
    return tl.sqrt(tile) if tile.dtype == tl.float64 else tl.sqrt_rn(tile)


@triton.jit
def one_minus_power(base, exponent):
    """1 - base**exponent in float64 without cancellation, for 0 <= base < 1 and exponent >= 1.

    expm1(x) = (u - 1) x / log(u) with u = exp(x): W. Kahan, in N. Higham, Accuracy and Stability of Numerical
    Algorithms, section 1.14.1, https://doi.org/10.1137/1.9780898718027.
    """
    # Not so far that the power becomes subnormal, which has few digits.
    x = tl.maximum(exponent * tl.log(tl.where(base > 0, base, 0.5)), -700.0)
    power = tl.exp(x)
    quotient = (1 - power) * x / tl.log(tl.where(power < 1, power, 0.5))
    return tl.where(base > 0, tl.where(power < 1, quotient, -x), 1.0)
