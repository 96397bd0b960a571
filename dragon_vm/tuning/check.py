"""Whether a configuration gives the right result: one step, held against the parity kit's reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.kernels import table
from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant
from dragon.vm.testing import (
    AdamOptions,
    AdamState,
    Fenced,
    SGDOptions,
    SGDState,
    assert_adam_step,
    assert_within_budget,
    sgd_errors,
)
from dragon.vm.tuning.scratch import Processor, Row, Tables, dtype_of

STEPS_TAKEN = 2

ADAM = AdamOptions(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, epsilon_hat=True)
SGD = SGDOptions(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1)
EMA_DECAY = 0.99

# Of the average, in eps of its largest addend: three roundings, and one of the interpreter, which truncates.
AVERAGE_BUDGET = 4.0


class WrongResultError(AssertionError):
    """A kernel wrote something else than the reference."""


class Tensors(NamedTuple):
    """One parameter's row in fences."""

    row: Row
    fences: tuple[Fenced, ...]


def check_candidate(
    variant: Variant, config: LaunchConfig, device: torch.device, processor: Processor
) -> str | None:
    """Run one step on small tensors around the borders of chunks; say what is wrong, None if nothing is.

    A tensor in each launch is misaligned, one is empty, and all lie between sentinels.
    """
    chunk = config.chunk
    layout = ((chunk + 17, 0), (0, 0), (1, 0), (chunk, 0), (2 * chunk - 1, 0), (chunk + 3, 1), (16, 0))
    generator = torch.Generator().manual_seed(0)
    fenced = [_place(variant, numel, misalign, device, generator) for numel, misalign in layout]
    starts = [_copy(entry.row) for entry in fenced]
    rows = [entry.row for entry in fenced]
    try:
        tables = Tables(rows, variant.algorithm, hyperparameters(variant.algorithm), STEPS_TAKEN, processor)
        tables.launch(variant, config)()
        ends = [_copy(entry.row) for entry in fenced]
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            where = f"tensor {index} of {start.param.numel()} elements"
            _judge(variant, start, end, where)
            for fence in fenced[index].fences:
                fence.check(where)
    except AssertionError as error:
        return str(error)
    # A launch may fail in as many ways as there are drivers.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def hyperparameters(algorithm: str) -> dict[Any, float]:
    """Columns of the hyperparameter table for the step that is checked, and for those that are timed."""
    shared = {table.EMA_DECAY: EMA_DECAY}
    if algorithm == "adam":
        return shared | {
            table.LR: ADAM.lr,
            table.BETA1: ADAM.betas[0],
            table.BETA2: ADAM.betas[1],
            table.EPS: ADAM.eps,
            table.EPSILON_HAT: float(ADAM.epsilon_hat),
            table.WEIGHT_DECAY: ADAM.weight_decay,
        }
    if algorithm == "sgd":
        return shared | {
            table.LR: SGD.lr,
            table.MOMENTUM: SGD.momentum,
            table.DAMPENING: SGD.dampening,
            table.WEIGHT_DECAY: SGD.weight_decay,
        }
    return shared


def _place(
    variant: Variant, numel: int, misalign: int, device: torch.device, generator: torch.Generator
) -> Tensors:
    fences: list[Fenced] = []

    def place(dtype_name: str, values: Tensor) -> Tensor:
        fence = Fenced((numel,), dtype=dtype_of(dtype_name), device=device, misalign=misalign)
        fence.tensor.copy_(values)
        fences.append(fence)
        return fence.tensor

    def random() -> Tensor:
        return torch.randn(numel, generator=generator, dtype=torch.float64)

    param, grad = place(variant.param_dtype, random()), place(variant.grad_dtype, random())
    # The first state is a mean and has a sign; the others are means of squares.
    states = tuple(
        place(variant.state_dtype, random() if index == 0 else random().square())
        for index in range(variant.n_states)
    )
    ema = place(variant.state_dtype, random()) if variant.average else None
    return Tensors(Row(param, grad, states, ema), tuple(fences))


def _copy(row: Row) -> Row:
    """The row's tensors on the CPU."""
    param, grad, *rest = [tensor.to("cpu", copy=True) for tensor in row.tensors()]
    return Row(param, grad, tuple(rest[: len(row.states)]), None if row.ema is None else rest[-1])


def _judge(variant: Variant, start: Row, end: Row, where: str) -> None:
    """Hold a step against the reference.

    Raises:
        AssertionError: says what is wrong.
    """
    if variant.algorithm == "adam":
        options = AdamOptions(**{**vars(ADAM), "amsgrad": variant.n_states > 2})
        before, after = _adam_state(start, STEPS_TAKEN), _adam_state(end, STEPS_TAKEN + 1)
        assert_adam_step(before, start.grad, after, options, where=where)
    elif variant.algorithm == "sgd":
        momentum = SGD.momentum if variant.n_states else 0.0
        options_sgd = SGDOptions(**{**vars(SGD), "momentum": momentum})
        errors = sgd_errors(_sgd_state(start), start.grad, _sgd_state(end), options_sgd)
        assert_within_budget(errors, where=where)
    else:
        wide = torch.float64 if start.param.dtype == torch.float64 else torch.float32
        _expect_bits((start.param.to(wide) + start.grad.to(wide)).to(start.param.dtype), end.param, where)
    _expect_bits(torch.zeros_like(start.grad) if variant.zero_grad else start.grad, end.grad, f"grad of {where}")
    if start.ema is not None and end.ema is not None:
        _expect_average(start.ema, end.param, end.ema, where)


def _adam_state(row: Row, step: int) -> AdamState:
    exp_avg, exp_avg_sq, *largest = row.states
    return AdamState(row.param, float(step), exp_avg, exp_avg_sq, largest[0] if largest else None)


def _sgd_state(row: Row) -> SGDState:
    return SGDState(row.param, row.states[0] if row.states else None)


def _expect_bits(expected: Tensor, got: Tensor, where: str) -> None:
    if not torch.equal(expected, got):
        raise WrongResultError(f"{where}: {int((expected != got).sum())} elements are wrong")


def _expect_average(start: Tensor, param: Tensor, got: Tensor, where: str) -> None:
    """Expect start + (1 - decay) (param - start), of the parameter as it is stored."""
    wide_start, wide_param = start.double(), param.double()
    expected = wide_start + (1 - EMA_DECAY) * (wide_param - wide_start)
    unit = torch.finfo(start.dtype).eps * torch.maximum(wide_start.abs(), wide_param.abs())
    # Written as "not <=" so that a NaN is no pass.
    n_wrong = int((~((got.double() - expected).abs() <= AVERAGE_BUDGET * unit)).sum())
    if n_wrong:
        raise WrongResultError(f"ema of {where}: {n_wrong} elements are wrong")
