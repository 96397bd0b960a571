"""Columns of the device tables: the one place where host and kernels agree on a layout.

A kernel takes nothing but pointers to tables and compile-time constants. A device has one set of tables:

* tensors, int64 ``[n_tensors, TENSOR_COLUMNS]``: addresses, element count and group of each tensor;
* grads, int64 ``[n_tensors]``: the address of each gradient, ABSENT where a tensor has none at this step; apart so
  that a graph replay copies nothing else;
* groups, float64 ``[n_groups, GROUP_COLUMNS]``: the hyperparameters of each parameter group;
* sources, int64 ``[n_groups, SOURCE_COLUMNS]``: addresses of hyperparameters that are device tensors;
* counts, int64 ``[COUNTS]``: sizes that `advance_kernel` reads instead of taking integers as arguments;
* chunks, int32 ``[1 + n_chunks, 2]``, one table a `Spec`: ``(n_chunks, 0)``, then tensor row and chunk index of
  each chunk;
* spans, int32 ``[n_spans, 2]``, one table a gradient dtype: tensor row and span index of each span;
* scalars, ``[n_tensors, SCALAR_COLUMNS]``: what `advance_kernel` derives for each tensor. Each row takes
  ``SCALAR_COLUMNS`` float64 words: float64 values where WIDE is set, else float32 values in the first half.

The kernels load neighbouring columns together: 2 of the tensors, 4 of the scalars, 16 bytes of float32. Each table
starts at a multiple of 16 bytes, and the numbers of columns keep each row at one.
"""

from __future__ import annotations

import triton.language as tl

# Tensors. Addresses are bytes; 0 stands for "no such tensor". Columns stand in pairs that are loaded together.
PARAM = tl.constexpr(0)
NUMEL = tl.constexpr(1)
STATE_0 = tl.constexpr(2)
STATE_1 = tl.constexpr(3)
STATE_2 = tl.constexpr(4)
EMA = tl.constexpr(5)
# Index of the parameter group.
GROUP = tl.constexpr(6)
# Address of a float32 counter; 0 for a tensor that is always at its first step.
STEP = tl.constexpr(7)
# 1 if the tensor's update computes in float64, which decides the dtype of its scalars.
WIDE = tl.constexpr(8)
# The tensor's partial norms: [FIRST_PARTIAL, END_PARTIAL) in the partials that `norm_kernel` writes.
FIRST_PARTIAL = tl.constexpr(9)
END_PARTIAL = tl.constexpr(10)
# The second part of the parameter: what it lacks of its master, or the master.
PARAM_REST = tl.constexpr(11)
# The second parts of the first two states: the scales of their blocks.
SCALE_0 = tl.constexpr(12)
SCALE_1 = tl.constexpr(13)
# What decides the random words, beside the step: the global index of the first element, a number of the tensor's
# own, and the seed.
INDEX_BASE = tl.constexpr(14)
STREAM = tl.constexpr(15)
SEED = tl.constexpr(16)
# One more than there are, so that each pair is a multiple of 16 bytes.
TENSOR_COLUMNS = tl.constexpr(18)

# In place of a gradient's address: the tensor takes no part in this step. A gradient without elements has 0.
ABSENT = tl.constexpr(1)

# Groups.
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
SKIP_NONFINITE = tl.constexpr(8)
BETA1 = tl.constexpr(9)
BETA2 = tl.constexpr(10)
EPS = tl.constexpr(11)
EPSILON_HAT = tl.constexpr(12)
MOMENTUM = tl.constexpr(13)
DAMPENING = tl.constexpr(14)
NESTEROV = tl.constexpr(15)
# The bound of the first moment since the betas have changed; 0 if they never did.
BOUND = tl.constexpr(16)
GROUP_COLUMNS = tl.constexpr(17)

# Sources: 0, or the address of a device tensor to read instead of the group's column.
# A float32 address is a multiple of 4; the lowest bit set marks a float64 tensor.
LR_SOURCE = tl.constexpr(0)
BETA1_SOURCE = tl.constexpr(1)
BETA2_SOURCE = tl.constexpr(2)
SOURCE_COLUMNS = tl.constexpr(3)

# Counts.
N_TENSORS = tl.constexpr(0)
N_PARTIALS = tl.constexpr(1)
COUNTS = tl.constexpr(2)

# Scalars, written on the device. Columns stand in fours that are loaded together.
# 0 where the step is skipped or the gradient absent: the update leaves the tensor alone.
ACTIVE = tl.constexpr(0)
GRAD_SCALE = tl.constexpr(1)
CLIP = tl.constexpr(2)
L2 = tl.constexpr(3)
DECAY = tl.constexpr(4)
ONE_MINUS_EMA_DECAY = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
DENOM_EPS = tl.constexpr(7)
BETA1_FACTOR = tl.constexpr(8)
ONE_MINUS_BETA1 = tl.constexpr(9)
BETA2_FACTOR = tl.constexpr(10)
ONE_MINUS_BETA2 = tl.constexpr(11)
MOMENTUM_DECAY = tl.constexpr(12)
MOMENTUM_GAIN = tl.constexpr(13)
NESTEROV_FLAG = tl.constexpr(14)
# The largest first moment for a root of the second one of 1.
MOMENT_BOUND = tl.constexpr(15)
SCALAR_COLUMNS = tl.constexpr(16)

# Status, float64 [STATUS_COLUMNS], written on the device and read only on request.
N_SKIPPED = tl.constexpr(0)
GRAD_NORM = tl.constexpr(1)
STATUS_COLUMNS = tl.constexpr(2)
