"""How wrong a step may be, in units of the operand's eps (`dragon.vm.testing.units`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Slack: an element may be as wrong as PyTorch's fused step from the same start, plus this.

    Measured with `python -m dragon.vm.testing.measure` (3000 random steps of 64 elements for each dtype, torch
    2.13, x86-64): the largest errors of `torch.optim.Adam`, in units, and by how much an element of the
    for-loop is worse than the same element of the fused operation.

        dtype     for-loop                       fused                          for-loop over fused
                  param  exp_avg  exp_avg_sq     param  exp_avg  exp_avg_sq     param  exp_avg  exp_avg_sq
        float32   1.12   1.44     2.37           1.12   1.44     2.37           0.90   0        0
        float64   1.10   1.41     1.85           1.10   1.41     1.85           0.25   0        0
        bfloat16  0.91   1.32     2.25           0.92   0.99     0.99           0.89   0.98     1.85
        float16   inf    1.41     1.82           0.94   0.94     0.91           inf    1.17     1.61

    foreach is as the for-loop (bfloat16 param 1.07). The for-loop's 16-bit rows are judged by 16-bit arithmetic;
    float16 is infinitely wrong there because eps = 1e-8 is zero in it. The slack allows other orders of the same
    operations, each rounded once: at worst 4.5 units of exp_avg and 6.5 of exp_avg_sq. `1 - beta` in float32 is
    off by 100 and more.

    Where a tensor is stored more coarsely than the arithmetic computes, a unit of slack is two units of the
    arithmetic: the storage itself must round to nearest, and bits that are cut off are an error. 2**16 units of
    slack allow two eps of bfloat16 beside float32 arithmetic, 2**13 two of float16.
    """

    param: float = 3.0
    exp_avg: float = 3.0
    exp_avg_sq: float = 6.0
    max_exp_avg_sq: float = 6.0
    momentum_buffer: float = 3.0


DEFAULT_BUDGET = Budget()
