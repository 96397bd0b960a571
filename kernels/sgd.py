"""SGD: the update of a tile, and the scalars that it needs."""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import table
from dragon.kernels.scalars import hyperparameter, store_scalar
from dragon.kernels.spec import n_states


@triton.jit
def sgd_update(param, grad, states, scalars, SPEC: tl.constexpr):
    """One SGD step of a tile, in PyTorch's form of momentum; the state, if there is one, is momentum_buffer.

    b <- momentum b + (1 - dampening) g;  p <- p - lr b, or p - lr (g + momentum b) with Nesterov's
    (Sutskever et al., https://proceedings.mlr.press/v28/sutskever13.html).
    """
    new_states = states
    if n_states(SPEC) > 0:
        decay = scalars[table.MOMENTUM_DECAY]
        momentum_buffer = decay * states[0] + scalars[table.MOMENTUM_GAIN] * grad
        nesterov = scalars[table.NESTEROV_FLAG] != 0
        grad = tl.where(nesterov, grad + decay * momentum_buffer, momentum_buffer)
        new_states = (momentum_buffer,)
    return param - scalars[table.STEP_SIZE] * grad, new_states


@triton.jit
def sgd_scalars(group, target, lr, step):
    """Write learning rate and momentum of an SGD step; the first gradient enters the buffer undamped."""
    store_scalar(target, table.STEP_SIZE, lr)
    store_scalar(target, table.MOMENTUM_DECAY, hyperparameter(group, table.MOMENTUM))
    gain = tl.where(step > 1, 1 - hyperparameter(group, table.DAMPENING), 1.0)
    store_scalar(target, table.MOMENTUM_GAIN, gain)
    store_scalar(target, table.NESTEROV_FLAG, hyperparameter(group, table.NESTEROV))
