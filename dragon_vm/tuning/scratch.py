"""Scratch memory for an update kernel, and the tables that a launch reads: no optimizer takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.kernels import table
from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant, launch_advance, launch_update
from dragon.kernels.norm import NO_NORM
from dragon.vm.torch.optim._plan import arena_offsets, plan_chunks

STATE_COLUMNS = (table.STATE_0, table.STATE_1, table.STATE_2)

# Of each tensor, so that it takes the vector path.
ALIGNMENT_NBYTES = 16


class Row(NamedTuple):
    """Tensors of one parameter, all of its element count."""

    param: Tensor  # param_dtype
    grad: Tensor  # grad_dtype
    states: tuple[Tensor, ...]  # state_dtype
    ema: Tensor | None  # state_dtype

    def tensors(self) -> list[Tensor]:
        """All tensors there are."""
        return [self.param, self.grad, *self.states, *([] if self.ema is None else [self.ema])]


class Processor(NamedTuple):
    """What a launch must know of a device: multiprocessors, and threads of a warp."""

    n_processors: int = 1
    warp_size: int = 32


def dtype_of(name: str) -> torch.dtype:
    """A torch dtype from its name in a `Variant`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def nbytes_per_element(variant: Variant) -> int:
    """Bytes that a launch reads and writes for an element."""
    param, grad, state = (dtype_of(name).itemsize for name in variant[2:5])
    n_states = variant.n_states + variant.average
    return 2 * param + (2 if variant.zero_grad else 1) * grad + 2 * n_states * state


def allocate(variant: Variant, numels: Sequence[int], device: torch.device) -> list[Row]:
    """Random parameters and gradients, and states of small positive numbers, each kind in one buffer.

    Raises:
        torch.OutOfMemoryError: if they do not fit the device.
    """
    generator = torch.Generator(device).manual_seed(0)

    def tensors(dtype_name: str, scale: float, shift: float) -> list[Tensor]:
        dtype = dtype_of(dtype_name)
        offsets = arena_offsets(numels, ALIGNMENT_NBYTES // dtype.itemsize)
        buffer = torch.empty(offsets[-1], dtype=dtype, device=device)
        buffer.uniform_(generator=generator).mul_(scale).add_(shift)
        return [buffer[first : first + numel] for first, numel in zip(offsets[:-1], numels, strict=True)]

    params = tensors(variant.param_dtype, 2.0, -1.0)
    grads = tensors(variant.grad_dtype, 2.0, -1.0)
    states = [tensors(variant.state_dtype, 0.1, 0.01) for _ in range(variant.n_states + variant.average)]
    return [
        Row(param, grad, tuple(rest[: variant.n_states]), rest[-1] if variant.average else None)
        for param, grad, *rest in zip(params, grads, *states, strict=True)
    ]


class Tables:
    """Device tables of some rows, which are one parameter group.

    Args:
        rows: the tensors; they must outlive the tables.
        algorithm: whose scalars the launches read.
        hyperparameters: columns of the hyperparameter table; the others are 0, the gradients' factor 1.
        steps_taken: before the step that is launched.
        processor: of the device.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        algorithm: str,
        hyperparameters: Mapping[Any, float],
        steps_taken: int,
        processor: Processor,
    ) -> None:
        self._device, self._processor = rows[0].param.device, processor
        self._numels = [row.param.numel() for row in rows]
        self._steps = steps = torch.full((len(rows),), float(steps_taken), device=self._device)
        tensors = torch.zeros(len(rows), int(table.TENSOR_COLUMNS), dtype=torch.int64)
        for line, row, step in zip(tensors, rows, steps, strict=True):
            columns = {table.PARAM: row.param, table.GRAD: row.grad, table.EMA: row.ema, table.STEP: step}
            columns.update(zip(STATE_COLUMNS, row.states, strict=False))
            for column, tensor in columns.items():
                line[int(column)] = 0 if tensor is None else tensor.data_ptr()
            line[int(table.NUMEL)] = row.param.numel()
            line[int(table.VECTOR)] = all(t.data_ptr() % ALIGNMENT_NBYTES == 0 for t in row.tensors())
        self._tensors = tensors.to(self._device)
        self._scalars = self._zeros(len(rows) * int(table.SCALAR_COLUMNS))
        self._plans: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._advance(algorithm, {table.GRAD_FACTOR: 1.0, **hyperparameters})

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float64, device=self._device)

    def _advance(self, algorithm: str, hyperparameters: Mapping[Any, float]) -> None:
        """Derive the scalars of each tensor, as a step does."""
        group = self._zeros(int(table.GROUP_COLUMNS))
        for column, value in hyperparameters.items():
            group[int(column)] = value
        launch_advance(
            algorithm,
            int(NO_NORM),
            False,
            len(self._numels),
            torch.tensor([len(self._numels), 0, 0], device=self._device),
            self._tensors,
            group,
            torch.zeros(int(table.SOURCE_COLUMNS), dtype=torch.int64, device=self._device),
            self._scalars,
            self._zeros(1),
            torch.ones(1, device=self._device),
            torch.zeros(1, device=self._device),
            self._zeros(int(table.STATUS_COLUMNS)),
            warp_size=self._processor.warp_size,
        )

    def _plan(self, chunk: int) -> tuple[int, Tensor, Tensor]:
        """Number of chunks, counts and chunks of a chunk size, kept for the next launch of that size."""
        if chunk not in self._plans:
            pairs = plan_chunks(self._numels, chunk)
            chunks = torch.frombuffer(pairs, dtype=torch.int32).to(self._device, copy=True)
            counts = torch.tensor([len(self._numels), len(pairs) // 2, 0], device=self._device)
            self._plans[chunk] = (len(pairs) // 2, counts, chunks)
        return self._plans[chunk]

    def launch(self, variant: Variant, config: LaunchConfig) -> Callable[[], None]:
        """A launch of a configuration, ready to go."""
        n_chunks, counts, chunks = self._plan(config.chunk)

        def run() -> None:
            pointers = (counts, chunks, self._tensors, self._scalars)
            launch_update(variant, config, n_chunks, *self._processor, *pointers)

        return run
