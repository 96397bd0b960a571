"""Scratch tensors for an update kernel, and the tables that a launch reads: no optimizer takes part."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.kernels import table
from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import advance_launcher, update_launcher
from dragon.kernels.norm import NO_NORM
from dragon.kernels.spec import Spec
from dragon.vm.measuring.machine import Machine
from dragon.vm.testing import AdamOptions, SGDOptions
from dragon.vm.torch.optim._table.chunks import plan_chunks

STEPS_TAKEN = 2

ADAM = AdamOptions(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, epsilon_hat=True)
SGD = SGDOptions(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1)
EMA_DECAY = 0.99

HYPERPARAMETERS: dict[str, dict[Any, float]] = {
    "adam": {
        table.LR: ADAM.lr,
        table.BETA1: ADAM.betas[0],
        table.BETA2: ADAM.betas[1],
        table.EPS: ADAM.eps,
        table.EPSILON_HAT: float(ADAM.epsilon_hat),
        table.WEIGHT_DECAY: ADAM.weight_decay,
        table.EMA_DECAY: EMA_DECAY,
    },
    "sgd": {
        table.LR: SGD.lr,
        table.MOMENTUM: SGD.momentum,
        table.DAMPENING: SGD.dampening,
        table.WEIGHT_DECAY: SGD.weight_decay,
        table.EMA_DECAY: EMA_DECAY,
    },
    "accumulate": {},
}

STATE_COLUMNS = (table.STATE_0, table.STATE_1, table.STATE_2)

# Of each tensor, so that it takes the vector path.
ALIGNMENT_NBYTES = 16


class Row(NamedTuple):
    """Tensors of one parameter, all of its element count."""

    param: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]
    ema: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All tensors there are."""
        return [self.param, self.grad, *self.states, *([] if self.ema is None else [self.ema])]


def dtype_of(name: str) -> torch.dtype:
    """A torch dtype from its name in a `Spec`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def nbytes_per_element(spec: Spec) -> int:
    """Bytes that a launch reads and writes for an element."""
    kept = [spec.param, *spec.states, *([spec.average] if spec.average else [])]
    grad = dtype_of(spec.grad).itemsize
    return 2 * sum(dtype_of(name).itemsize for name in kept) + (2 if spec.zero_grad else 1) * grad


def allocate(spec: Spec, numels: Sequence[int], device: torch.device) -> list[Row]:
    """Random parameters and gradients, and states of small positive numbers, each kind in one buffer.

    Raises:
        torch.OutOfMemoryError: if they do not fit the device.
    """
    generator = torch.Generator(device).manual_seed(0)

    def tensors(dtype_name: str, scale: float, shift: float) -> list[Tensor]:
        dtype = dtype_of(dtype_name)
        step = ALIGNMENT_NBYTES // dtype.itemsize
        offsets = list(accumulate((-(-numel // step) * step for numel in numels), initial=0))
        buffer = torch.empty(offsets[-1], dtype=dtype, device=device)
        buffer.uniform_(generator=generator).mul_(scale).add_(shift)
        return [buffer[first : first + numel] for first, numel in zip(offsets[:-1], numels, strict=True)]

    params, grads = tensors(spec.param, 2.0, -1.0), tensors(spec.grad, 2.0, -1.0)
    states = [tensors(name, 0.1, 0.01) for name in spec.states]
    emas = tensors(spec.average, 0.1, 0.01) if spec.average else [None] * len(numels)
    rows = zip(params, grads, zip(*states, strict=True) if states else [()] * len(numels), emas, strict=True)
    return [Row(*row) for row in rows]


def chunk_pairs(numels: Sequence[int], chunk: int) -> Tensor:
    """(row, chunk index) of every chunk, behind a first line of (number of chunks, 0), int32 [1 + n_chunks, 2]."""
    pairs = plan_chunks(numels, chunk)
    return torch.frombuffer(array("i", [len(pairs) // 2, 0]) + pairs, dtype=torch.int32).view(-1, 2)


def group_table(algorithm: str, device: torch.device) -> Tensor:
    """The hyperparameter table of one group: the algorithm's columns, 1 for the gradients' factor, and else 0."""
    group = torch.zeros(int(table.GROUP_COLUMNS), dtype=torch.float64)
    for column, value in {table.GRAD_FACTOR: 1.0, **HYPERPARAMETERS[algorithm]}.items():
        group[int(column)] = value
    return group.to(device)


class Tables:
    """Device tables of some rows, which are one parameter group.

    Args:
        rows: the tensors, which the tables keep.
        spec: which kernel.
        machine: the device.
    """

    def __init__(self, rows: Sequence[Row], spec: Spec, machine: Machine) -> None:
        self._rows, self._spec, self._machine, self._device = rows, spec, machine, rows[0].param.device
        self._numels = [row.param.numel() for row in rows]
        self._steps = steps = torch.full((len(rows),), float(STEPS_TAKEN), device=self._device)
        tensors = torch.zeros(len(rows), int(table.TENSOR_COLUMNS), dtype=torch.int64)
        for line, row, step in zip(tensors, rows, steps, strict=True):
            columns = {table.PARAM: row.param, table.EMA: row.ema, table.STEP: step}
            columns.update(zip(STATE_COLUMNS, row.states, strict=False))
            for column, tensor in columns.items():
                line[int(column)] = 0 if tensor is None else tensor.data_ptr()
            line[int(table.NUMEL)] = row.param.numel()
            line[int(table.WIDE)] = spec.param == "float64"
        self._tensors = tensors.to(self._device)
        self._grads = torch.tensor([row.grad.data_ptr() for row in rows], device=self._device)
        self._scalars = self._zeros(len(rows) * int(table.SCALAR_COLUMNS))
        self._chunks: dict[int, Tensor] = {}
        # Derive the scalars of each tensor, as a step does.
        advance_launcher(spec.algorithm, int(NO_NORM), False, len(rows), machine.warp_size)(
            torch.tensor([len(rows), 0], device=self._device),
            self._tensors,
            self._grads,
            group_table(spec.algorithm, self._device),
            torch.zeros(int(table.SOURCE_COLUMNS), dtype=torch.int64, device=self._device),
            self._scalars,
            self._zeros(1),
            torch.ones(1, device=self._device),
            torch.zeros(1, device=self._device),
            self._zeros(int(table.STATUS_COLUMNS)),
        )

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float64, device=self._device)

    def launch(self, config: LaunchConfig) -> Callable[[], None]:
        """A launch of a configuration, ready to go; the chunks of a size are made once."""
        if config.chunk not in self._chunks:
            self._chunks[config.chunk] = chunk_pairs(self._numels, config.chunk).to(self._device)
        chunks = self._chunks[config.chunk]
        launch = update_launcher(
            self._spec, config, len(chunks) - 1, self._machine.n_processors, self._machine.warp_size
        )
        return lambda: launch(chunks, self._tensors, self._grads, self._scalars, None)
