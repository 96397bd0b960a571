"""Device tables built by hand, so that the kernels are tested without the host code that usually fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dragon.kernels import launch, table
from dragon.kernels.config import LaunchConfig
from dragon.kernels.norm import NO_NORM, SPAN
from dragon.kernels.spec import Spec

SMALL = LaunchConfig(chunk=128)


@dataclass
class Row:
    """Tensors of one row of the tensor table; any may be absent, and `wide` is worked out unless given."""

    param: Tensor | None = None
    grad: Tensor | None = None
    states: tuple[Tensor, ...] = ()
    ema: Tensor | None = None
    step: Tensor | None = None
    group: int = 0
    numel: int | None = None
    wide: bool | None = None

    def __post_init__(self) -> None:
        if self.numel is None:
            self.numel = next(t.numel() for t in (self.param, self.grad) if t is not None)
        if self.wide is None:
            self.wide = self.param is not None and self.param.dtype == torch.float64


@dataclass
class Tables:
    """All that the kernels read and write.

    Attributes:
        rows: one for each tensor.
        groups: one row of the hyperparameter table each, as columns and values; absent columns are 0.
        sources: by group and source column, the device tensor to read.
        chunk: elements a chunk.
        chunks: tensor row and chunk index of each chunk; by default every chunk of every tensor, in order.
    """

    rows: Sequence[Row]
    groups: Sequence[dict[object, float]] = ({},)
    sources: dict[tuple[int, object], Tensor] = field(default_factory=dict)
    chunk: int = 128
    chunks: list[tuple[int, int]] | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        n = len(self.rows)
        if self.chunks is None:
            self.chunks = self._cut(self.chunk)
        self.spans = self._cut(SPAN.value)
        self.table = torch.zeros(n, table.TENSOR_COLUMNS.value, dtype=torch.int64)
        for i, row in enumerate(self.rows):
            self._fill(self.table[i], row)
            mine = [j for j, (owner, _) in enumerate(self.spans) if owner == i]
            self.table[i, table.FIRST_PARTIAL.value] = mine[0] if mine else 0
            self.table[i, table.END_PARTIAL.value] = mine[-1] + 1 if mine else 0
        hyper = torch.zeros(len(self.groups), table.GROUP_COLUMNS.value, dtype=torch.float64)
        for i, group in enumerate(self.groups):
            hyper[i, table.GRAD_FACTOR.value] = 1.0
            for column, value in group.items():
                hyper[i, column.value] = value
        sources = torch.zeros(len(self.groups), table.SOURCE_COLUMNS.value, dtype=torch.int64)
        for (group_index, column), tensor in self.sources.items():
            sources[group_index, column.value] = tensor.data_ptr() + (tensor.dtype == torch.float64)
        counts = torch.tensor([n, len(self.spans)])
        grads = torch.tensor([0 if row.grad is None else row.grad.data_ptr() for row in self.rows])

        self.tensors, self.hyper, self.source_table = (t.to(self.device) for t in (self.table, hyper, sources))
        self.counts, self.grads = counts.to(self.device), grads.to(self.device)
        header = (len(self.chunks), 0)
        self.chunk_table = torch.tensor([header, *self.chunks], dtype=torch.int32, device=self.device)
        self.span_table = torch.tensor(self.spans, dtype=torch.int32, device=self.device).view(-1, 2)
        # What a kernel must write before it is read is NaN until then.
        self.scalars = self._full((n, table.SCALAR_COLUMNS.value), float("nan"))
        self.partials = self._full((max(len(self.spans), 1),), float("nan"))
        self.status = self._full((table.STATUS_COLUMNS.value,), 0.0)
        self.grad_scale = torch.ones(1, device=self.device)
        self.found_inf = torch.zeros(1, device=self.device)

    def _full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64, device=self.device)

    def _cut(self, size: int) -> list[tuple[int, int]]:
        return [(i, j) for i, row in enumerate(self.rows) for j in range(-(-row.numel // size))]

    @staticmethod
    def _fill(line: Tensor, row: Row) -> None:
        states = (table.STATE_0, table.STATE_1, table.STATE_2)
        tensors = {table.PARAM: row.param, table.EMA: row.ema, table.STEP: row.step}
        tensors |= dict(zip(states, row.states, strict=False))
        for column, tensor in tensors.items():
            line[column.value] = 0 if tensor is None else tensor.data_ptr()
        line[table.NUMEL.value] = row.numel
        line[table.GROUP.value] = row.group
        line[table.WIDE.value] = row.wide

    def scalar_row(self, row: int) -> Tensor:
        """A view of a tensor's scalars in the dtype of its maths."""
        return self.scalars[row] if self.rows[row].wide else self.scalars[row].view(torch.float32)

    def scalar(self, row: int, column: object) -> float:
        """A scalar that `advance_kernel` derived."""
        return self.scalar_row(row)[column.value].item()

    def column(self, column: object) -> list[float]:
        """A scalar of every tensor."""
        return [self.scalar(i, column) for i in range(len(self.rows))]

    def set_scalars(self, **columns: float) -> Tables:
        """Fill columns of the scalar table for every tensor, the others with what leaves an update as it is."""
        neutral = {"ACTIVE": 1.0, "GRAD_SCALE": 1.0, "CLIP": float("inf"), "L2": 0.0, "DECAY": 1.0}
        for name, value in {**neutral, **columns}.items():
            for i in range(len(self.rows)):
                self.scalar_row(i)[getattr(table, name).value] = value
        return self

    def advance(self, algorithm: str = "adam", norm: int = NO_NORM.value, clip_each: bool = False) -> None:
        """Launch `advance_kernel`."""
        launch.advance_launcher(algorithm, norm, clip_each, len(self.rows))(
            self.counts, self.tensors, self.grads, self.hyper, self.source_table,
            self.scalars, self.partials, self.grad_scale, self.found_inf, self.status,
        )  # fmt: skip

    def update(
        self, spec: Spec, config: LaunchConfig = SMALL, n_processors: int = 1, *, unscales: bool = False
    ) -> None:
        """Launch `update_kernel`; it may leave gradients divided by `grad_scale`."""
        assert config.chunk == self.chunk, "the chunks were cut for another configuration"
        if self.chunks:
            launch.update_launcher(spec, config, len(self.chunks), n_processors)(
                self.chunk_table, self.tensors, self.grads, self.scalars, self.grad_scale if unscales else None
            )

    def reduce(self, norm: int, dtype: str = "float32", sum_dtype: str = "float64") -> None:
        """Launch `norm_kernel`."""
        if self.spans:
            launch.norm_launcher(dtype, norm, len(self.spans), sum_dtype=sum_dtype)(
                self.span_table, self.tensors, self.grads, self.hyper, self.partials
            )


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name in a `Spec`."""
    return str(dtype).removeprefix("torch.")


def spec_of(algorithm: str, row: Row, zero_grad: bool = False) -> Spec:
    """The spec for a row's tensors."""
    param, grad, *states = (name_of(tensor.dtype) for tensor in (row.param, row.grad, *row.states))
    average = None if row.ema is None else name_of(row.ema.dtype)
    return Spec(algorithm, param, grad, tuple(states), average, zero_grad)


def place(values: Tensor, offset: int = 0) -> Tensor:
    """A copy that starts `offset` elements past a 64-byte border."""
    buffer = torch.empty(values.numel() + offset + 64, dtype=values.dtype, device=values.device)
    first = -(buffer.data_ptr() // values.element_size()) % (64 // values.element_size()) + offset
    return buffer[first : first + values.numel()].copy_(values)


def at_same_offset(like: Tensor, value: float = 0.0) -> Tensor:
    """A constant tensor of `like`'s size at its alignment."""
    return place(torch.full_like(like, value), like.data_ptr() % 64 // like.element_size())
