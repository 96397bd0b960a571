"""Whether a configuration gives the right result: one step, held against the parity kit's reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dragon.kernels.config import LaunchConfig
from dragon.kernels.spec import Spec
from dragon.vm._words import counted
from dragon.vm.measuring.machine import Machine
from dragon.vm.testing import AdamState, Fenced, SGDState, assert_adam_step, assert_within_budget, sgd_errors
from dragon.vm.tuning.scratch import ADAM, EMA_DECAY, SGD, STEPS_TAKEN, Row, Tables, dtype_of

# Of the average, in eps of its largest addend: three roundings, and one of the interpreter, which truncates.
AVERAGE_BUDGET = 4.0


def check_candidate(spec: Spec, config: LaunchConfig, machine: Machine) -> str | None:
    """Run one step on small tensors around the borders of chunks; say what is wrong, None if nothing is.

    A tensor in each launch is misaligned, one is empty, and all lie between sentinels.
    """
    chunk = config.chunk
    layout = ((chunk + 17, 0), (0, 0), (1, 0), (chunk, 0), (2 * chunk - 1, 0), (chunk + 3, 1), (16, 0))
    generator = torch.Generator().manual_seed(0)
    placed = [_place(spec, numel, misalign, machine.device, generator) for numel, misalign in layout]
    rows = [row for row, _ in placed]
    starts = [_copy(row) for row in rows]
    try:
        Tables(rows, spec, machine).launch(config)()
        ends = [_copy(row) for row in rows]
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            where = f"tensor {index} of {counted(start.param.numel(), 'element')}"
            _judge(spec, start, end, where)
            for fence in placed[index][1]:
                fence.check(where)
    except AssertionError as error:
        return str(error)
    # A launch may fail in as many ways as there are drivers.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _place(
    spec: Spec, numel: int, misalign: int, device: torch.device, generator: torch.Generator
) -> tuple[Row, list[Fenced]]:
    """One parameter's tensors, and the fences that they lie in."""
    fences: list[Fenced] = []

    def place(dtype_name: str, square: bool = False) -> Tensor:
        values = torch.randn(numel, generator=generator, dtype=torch.float64)
        fences.append(Fenced((numel,), dtype=dtype_of(dtype_name), device=device, misalign=misalign))
        fences[-1].tensor.copy_(values.square() if square else values)
        return fences[-1].tensor

    param, grad = place(spec.param), place(spec.grad)
    # The first state is a mean and has a sign; the others are means of squares.
    states = tuple(place(name, square=index > 0) for index, name in enumerate(spec.states))
    return Row(param, grad, states, place(spec.average) if spec.average else None), fences


def _copy(row: Row) -> Row:
    """The row's tensors on the CPU."""
    param, grad, *rest = [tensor.to("cpu", copy=True) for tensor in row.tensors()]
    return Row(param, grad, tuple(rest[: len(row.states)]), None if row.ema is None else rest[-1])


def _judge(spec: Spec, start: Row, end: Row, where: str) -> None:
    """Hold a step against the reference; an AssertionError says what is wrong."""
    if spec.algorithm == "adam":
        options = replace(ADAM, amsgrad=len(spec.states) > 2)
        before, after = (
            AdamState(row.param, float(step), *row.states, *[None] * (3 - len(row.states)))
            for row, step in ((start, STEPS_TAKEN), (end, STEPS_TAKEN + 1))
        )
        assert_adam_step(before, start.grad, after, options, where=where)
    elif spec.algorithm == "sgd":
        options_sgd = replace(SGD, momentum=SGD.momentum if spec.states else 0.0)
        old, new = (SGDState(row.param, *(row.states or [None])) for row in (start, end))
        assert_within_budget(sgd_errors(old, start.grad, new, options_sgd), where=where)
    else:
        _expect((start.param + start.grad).to(start.param.dtype) == end.param, where)
    _expect(end.grad == (torch.zeros_like(start.grad) if spec.zero_grad else start.grad), f"grad of {where}")
    if start.ema is not None and end.ema is not None:
        # start + (1 - decay) (param - start), of the parameter as it is stored.
        old_ema, param = start.ema.double(), end.param.double()
        unit = torch.finfo(start.ema.dtype).eps * torch.maximum(old_ema.abs(), param.abs())
        error = (end.ema.double() - (old_ema + (1 - EMA_DECAY) * (param - old_ema))).abs()
        _expect(error <= AVERAGE_BUDGET * unit, f"ema of {where}")


def _expect(is_right: Tensor, where: str) -> None:
    if not is_right.all():
        raise AssertionError(f"{where}: {counted(int((~is_right).sum()), 'wrong element')}")
