"""The kernels that are inspected: every kind of update, norm and advance that an optimizer launches."""

from __future__ import annotations

from dragon.kernels.launch import advance_constants, norm_constants
from dragon.kernels.norm import INF_NORM, L2_NORM, NO_NORM
from dragon.kernels.spec import Spec

FP32, BF16, FP16, FP64 = "float32", "bfloat16", "float16", "float64"

UPDATES: dict[str, Spec] = {
    "adam fp32": Spec("adam", FP32, FP32, (FP32,) * 2),
    "adam fp32 amsgrad": Spec("adam", FP32, FP32, (FP32,) * 3),
    "adam fp32 average": Spec("adam", FP32, FP32, (FP32,) * 2, average=FP32),
    "adam fp32 zero_grad": Spec("adam", FP32, FP32, (FP32,) * 2, zero_grad=True),
    "adam bf16": Spec("adam", BF16, BF16, (BF16,) * 2),
    "adam bf16 fp32-state": Spec("adam", BF16, BF16, (FP32,) * 2),
    "adam bf16 fp32-grad": Spec("adam", BF16, FP32, (BF16,) * 2),
    "adam bf16 fp32-grad fp32-state": Spec("adam", BF16, FP32, (FP32,) * 2),
    "adam fp16": Spec("adam", FP16, FP16, (FP16,) * 2),
    "adam fp64": Spec("adam", FP64, FP64, (FP64,) * 2),
    "sgd fp32": Spec("sgd", FP32, FP32),
    "sgd fp32 momentum": Spec("sgd", FP32, FP32, (FP32,)),
    "sgd bf16 momentum": Spec("sgd", BF16, BF16, (BF16,)),
    "accumulate fp32": Spec("accumulate", FP32, FP32),
    "accumulate fp32 bf16-grad": Spec("accumulate", FP32, BF16),
}

# Memory modes: their parameters, gradients and states are bf16 at most, but for the fp32 states of split16.
MODES: dict[str, Spec] = {
    "adam split16": Spec("adam", "split16", BF16, (FP32, FP32)),
    "adam bf16 stochastic": Spec("adam", "bfloat16_stochastic", BF16, (BF16, "bfloat16_stochastic")),
    "adam split8 q8": Spec("adam", "split8", BF16, ("q8_signed", "q8_square")),
    "adam split8 q8 stochastic": Spec("adam", "split8_stochastic", BF16, ("q8_signed", "q8_square_stochastic")),
}

# Launches that a `GradScaler` leaves unscaling to: they write the gradient that stays behind.
UNSCALES: dict[str, Spec] = {
    f"{name} unscale": UPDATES[name] for name in ("adam fp32", "adam bf16", "adam fp16", "sgd fp32 momentum")
}

NORMS = {
    f"norm {order} {dtype}": norm_constants(dtype, norm)
    for dtype in (FP32, BF16)
    for order, norm in (("L2", L2_NORM.value), ("inf", INF_NORM.value))
}
# For architectures on which float64 is slow.
NORMS |= {
    f"norm L2 {dtype} summed in fp32": norm_constants(dtype, L2_NORM.value, "float32") for dtype in (FP32, BF16)
}

ADVANCES = {
    f"advance {algorithm}{label}": advance_constants(algorithm, norm.value, clip_each)
    for algorithm in ("adam", "sgd")
    for label, norm, clip_each in (
        ("", NO_NORM, False),
        (" norm", L2_NORM, False),
        (" inf-norm", INF_NORM, False),
        (" clip-each", NO_NORM, True),
        (" norm clip-each", L2_NORM, True),
    )
}
