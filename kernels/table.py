"""Columns of the device tables: the one place where host and kernels agree on a layout.

Everything a launch needs travels in these tables, so that a kernel takes nothing but pointers and
compile-time constants:

* the tensor table, int64 ``[n_tensors, TENSOR_COLUMNS]``: addresses, element count and group row;
* the hyperparameter table, float64 ``[n_groups, GROUP_COLUMNS]``: one row a parameter group;
* the source table, int64 ``[n_groups, SOURCE_COLUMNS]``: addresses of hyperparameters that are device tensors;
* the counts, int64 ``[COUNTS]``: sizes that a launch reads instead of taking integers as arguments;
* the scalar table, float64 ``[n_tensors, SCALAR_COLUMNS]``: what `advance_kernel` derives for each tensor.
"""

from __future__ import annotations

import triton.language as tl

# Tensor table. Addresses are bytes; 0 stands for "no such tensor". STEP is the address of an fp32 counter.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE_0 = tl.constexpr(2)
STATE_1 = tl.constexpr(3)
STATE_2 = tl.constexpr(4)
EMA = tl.constexpr(5)
STEP = tl.constexpr(6)
NUMEL = tl.constexpr(7)
GROUP = tl.constexpr(8)
# 1 if every address of the row is a multiple of 16 bytes, so that its chunks take the vector path.
VECTOR = tl.constexpr(9)
# The row's partial norms: [FIRST_PARTIAL, END_PARTIAL) in the partials that `norm_kernel` writes.
FIRST_PARTIAL = tl.constexpr(10)
END_PARTIAL = tl.constexpr(11)
TENSOR_COLUMNS = tl.constexpr(12)

# What the state columns hold, by algorithm.
EXP_AVG = STATE_0
EXP_AVG_SQ = STATE_1
MAX_EXP_AVG_SQ = STATE_2
MOMENTUM_BUFFER = STATE_0

# Hyperparameter table.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
DECOUPLED = tl.constexpr(2)
# The group's own factor of its gradients, negative to maximise.
GRAD_FACTOR = tl.constexpr(3)
# 0 means "do not clip" in the three clip columns.
CLIP_VALUE = tl.constexpr(4)
CLIP_NORM = tl.constexpr(5)
MAX_GRAD_NORM = tl.constexpr(6)
EMA_DECAY = tl.constexpr(7)
BETA1 = tl.constexpr(8)
BETA2 = tl.constexpr(9)
EPS = tl.constexpr(10)
EPSILON_HAT = tl.constexpr(11)
MOMENTUM = tl.constexpr(8)
DAMPENING = tl.constexpr(9)
NESTEROV = tl.constexpr(10)
SKIP_NONFINITE = tl.constexpr(12)
GROUP_COLUMNS = tl.constexpr(13)

# Source table: 0, or the address of a device tensor to read instead of the column of the hyperparameter table.
# An fp32 address is a multiple of 4; the lowest bit set marks a float64 tensor.
LR_SOURCE = tl.constexpr(0)
BETA1_SOURCE = tl.constexpr(1)
BETA2_SOURCE = tl.constexpr(2)
SOURCE_COLUMNS = tl.constexpr(3)

# Counts.
N_TENSORS = tl.constexpr(0)
N_CHUNKS = tl.constexpr(1)
N_PARTIALS = tl.constexpr(2)
COUNTS = tl.constexpr(3)

# Scalar table, written on the device.
ACTIVE = tl.constexpr(0)
GRAD_SCALE = tl.constexpr(1)
CLIP = tl.constexpr(2)
L2 = tl.constexpr(3)
DECAY = tl.constexpr(4)
ONE_MINUS_EMA_DECAY = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
ONE_MINUS_BETA1 = tl.constexpr(7)
BETA2_FACTOR = tl.constexpr(8)
ONE_MINUS_BETA2 = tl.constexpr(9)
DENOM_EPS = tl.constexpr(10)
BETA1_FACTOR = tl.constexpr(11)
MOMENTUM_DECAY = tl.constexpr(7)
MOMENTUM_GAIN = tl.constexpr(8)
NESTEROV_FLAG = tl.constexpr(9)
SCALAR_COLUMNS = tl.constexpr(12)

# Status, float64 [STATUS_COLUMNS], written on the device and read only on request.
N_SKIPPED = tl.constexpr(0)
GRAD_NORM = tl.constexpr(1)
STATUS_COLUMNS = tl.constexpr(2)
