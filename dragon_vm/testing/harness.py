"""Run any `torch.optim.Optimizer` over a drawn case and judge each step from its own start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .budget import DEFAULT_BUDGET, Budget
from .cases import OptimizerCase, StepCase
from .fence import Fenced, FenceError
from .judge import FieldErrors, ParityError, adam_errors, assert_within_budget, sgd_errors
from .records import AdamOptions, SGDOptions
from .snapshots import adam_snapshot, sgd_snapshot
from .wide import real_view

MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeParameter = Callable[[Tensor], Tensor]


def _bits(tensor: Tensor) -> Tensor:
    # Into fresh memory: contiguous() keeps the strides of tensors of one element or none, which view()
    # refuses.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return flat.copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def _same_bits(a: Any, b: Any) -> bool:
    """Tell whether two tensors or numbers are equal bit by bit; NaN equals itself, None nothing else."""
    if a is None or b is None:
        return a is b
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def _changed_fields(before: Any, after: Any) -> list[str]:
    pairs = zip(before._fields, before, after, strict=True)
    return [name for name, old, new in pairs if not _same_bits(old, new)]


@dataclass
class _Run:
    """One run of one optimizer over one case."""

    # Of the algorithm, whose state and options they take.
    snapshot: Callable[..., Any]
    errors: Callable[..., list[FieldErrors]]
    make_optimizer: MakeOptimizer
    case: OptimizerCase
    defaults: Any
    budget: Budget
    state_dtype: torch.dtype | None
    compute_dtype: torch.dtype | None
    may_move: bool

    def start(self, make_parameter: MakeParameter, device: str) -> None:
        """Build the parameters and the optimizer."""
        self.fences = [tensor.build(device) for tensor in self.case.tensors]
        self.params = [make_parameter(fence.tensor) for fence in self.fences]
        for fence, param in zip(self.fences, self.params, strict=True):
            if param.data_ptr() != fence.tensor.data_ptr():
                raise ValueError("make_parameter must keep the memory of the tensor that it is given")
        self.group_of = [i for i, group in enumerate(self.case.groups) for _ in group.tensors]
        self.options = [replace(self.defaults, **self.case.options | group.options) for group in self.case.groups]
        given = [_bits(param) for param in self.params]
        self.optimizer = self.build_optimizer()
        for i, (param, bits) in enumerate(zip(self.params, given, strict=True)):
            if not torch.equal(_bits(param), bits):
                raise ParityError(f"parameter {i} was changed by the constructor")

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Call the factory with fresh group dicts of the same parameters."""
        params = iter(self.params)
        groups = [{"params": [next(params) for _ in group.tensors], **group.options} for group in self.case.groups]
        return self.make_optimizer(groups, **self.case.options)

    def snapshots(self) -> list[Any]:
        """Copy the state of every parameter."""
        found = []
        for i, param in enumerate(self.params):
            options = self.options[self.group_of[i]]
            state: Mapping[str, Any] = self.optimizer.state.get(param, {})
            dtype = self.state_dtype or param.dtype
            found.append(self.snapshot(param, state, options, dtype))
            # States of other names are the optimizer's own business.
            for name in found[-1]._fields:
                value = state.get(name) if name != "step" else None
                if isinstance(value, Tensor) and value.shape == param.shape and value.dtype != dtype:
                    raise ParityError(f"parameter {i}: {name} is {value.dtype}, expected {dtype}")
        return found

    def reload(self) -> None:
        """Go on with a fresh optimizer that has loaded the state of the old one, which may change no bit."""
        before = self.snapshots()
        saved = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer = self.build_optimizer()
        self.optimizer.load_state_dict(saved)
        for i, (old, new) in enumerate(zip(before, self.snapshots(), strict=True)):
            if changed := _changed_fields(old, new):
                raise ParityError(f"parameter {i}: {', '.join(changed)} changed by a save and load")

    def set_counts(self, count: int) -> None:
        """Set the step counters that there are."""
        for i, param in enumerate(self.params):
            state = self.optimizer.state.get(param, {})
            counter = state.get("step")
            if isinstance(counter, Tensor):
                if torch.tensor(count).to(counter.dtype).item() != count:
                    raise ParityError(f"parameter {i}: step is {counter.dtype}, which does not hold {count}")
                counter.fill_(count)
            elif "step" in state:
                state["step"] = count

    def set_gradients(self, step: StepCase) -> list[Fenced | None]:
        """Give every parameter the gradient of this step, or none."""
        fences: list[Fenced | None] = []
        for param, gradient in zip(self.params, step.gradients, strict=True):
            fence = None if gradient is None else gradient.build(param)
            param.grad = None
            if fence is not None:
                if fence.tensor.dtype != param.grad_dtype:
                    param.grad_dtype = fence.tensor.dtype
                param.grad = fence.tensor
            fences.append(fence)
        return fences

    def take(self, step: StepCase) -> None:
        """Take one step and judge it."""
        if step.reload:
            self.reload()
        if step.count is not None:
            self.set_counts(step.count)
        for i, lr in step.lr.items():
            self.optimizer.param_groups[i]["lr"] = lr
            self.options[i] = replace(self.options[i], lr=lr)
        gradients = self.set_gradients(step)
        given = [None if fence is None else fence.tensor.detach().clone() for fence in gradients]
        before = self.snapshots()
        self.optimizer.step()
        after = self.snapshots()
        for i, fence in enumerate(gradients):
            self.judge(i, before[i], given[i], after[i])
            self.check_memory(self.params[i], self.fences[i], f"parameter {i}")
            grad = self.params[i].grad
            if not _same_bits(given[i], grad):
                raise ParityError(f"parameter {i}: step() changed its gradient")
            if fence is not None and grad is not None:
                self.check_memory(grad, fence, f"gradient of parameter {i}")
                self.check_states(i, grad)

    def check_states(self, i: int, grad: Tensor) -> None:
        """Assert that no state lies in the memory of a gradient, which the next backward pass may overwrite."""
        state: Mapping[str, Any] = self.optimizer.state.get(self.params[i], {})
        memory = grad.untyped_storage().data_ptr()
        for name, value in state.items():
            if memory and isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory:
                raise ParityError(f"parameter {i}: {name} lies in the memory of its gradient")

    def check_memory(self, tensor: Tensor, fence: Fenced, name: str) -> None:
        """Assert that a tensor lies in its fence still, and that nothing outside of it was written."""
        if tensor.data_ptr() != fence.tensor.data_ptr() and not self.may_move:
            raise ParityError(f"{name} lies in other memory after the step; may_move=True allows that")
        fence.check(name)

    def judge(self, i: int, before: Any, grad: Tensor | None, after: Any) -> None:
        """Judge the step of parameter `i`."""
        if grad is None:
            if changed := _changed_fields(before, after):
                raise ParityError(f"parameter {i}: {', '.join(changed)} changed without a gradient")
            return
        options = self.options[self.group_of[i]]
        try:
            errors = self.errors(before, real_view(grad).cpu(), after, options, self.compute_dtype)
        except ParityError as error:
            raise ParityError(f"parameter {i}: {error}") from None
        assert_within_budget(errors, self.budget, f"parameter {i}, {options}")


def _check(run: _Run, make_parameter: MakeParameter, device: str) -> None:
    run.start(make_parameter, device)
    for number, step in enumerate(run.case.steps, 1):
        try:
            run.take(step)
        except (ParityError, FenceError) as error:
            raise type(error)(f"step {number} of {len(run.case.steps)}: {error}") from None


def check_adam(
    make_optimizer: MakeOptimizer,
    case: OptimizerCase,
    *,
    epsilon_hat: bool = False,
    defaults: AdamOptions | None = None,
    budget: Budget = DEFAULT_BUDGET,
    state_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    may_move: bool = False,
    make_parameter: MakeParameter = torch.nn.Parameter,
    device: str = "cpu",
) -> None:
    """Assert that an Adam takes every step of a case right.

    Parameters and gradients lie in fences; a step may write neither outside of the parameters nor to the
    gradients, and both stay in their memory. Parameters without a gradient keep their bits and their step count.
    A reload changes no bit of the state.

    Args:
        make_optimizer: Called with a list of groups and the drawn keyword arguments; gives any optimizer
            whose state has step, exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.
        case: What to run, from `adam_cases`.
        epsilon_hat: Which form of epsilon the optimizer implements; it is not passed to it. `defaults` may say it
            too.
        defaults: What the optimizer takes for arguments that are left out; None for PyTorch's Adam.
        budget: Slack by field, in units of the operand's eps.
        state_dtype: Dtype that the states must have, None for the parameter's.
        compute_dtype: Precision of its arithmetic, None for `default_compute_dtype`.
        may_move: Whether the optimizer may move parameters and gradients to memory of its own, in which no fence
            watches what it writes.
        make_parameter: Makes a parameter of a tensor, in the same memory.
        device: Where to put the parameters.

    Raises:
        ParityError: A value is out of budget, a step count, gradient or state is not what it should be, or a
            parameter or gradient lies in other memory after a step.
        FenceError: Memory outside of a parameter or gradient was written.
    """
    options = defaults or AdamOptions()
    options = replace(options, epsilon_hat=epsilon_hat or options.epsilon_hat)
    run = _Run(
        adam_snapshot, adam_errors, make_optimizer, case, options, budget, state_dtype, compute_dtype, may_move
    )
    _check(run, make_parameter, device)


def check_sgd(
    make_optimizer: MakeOptimizer,
    case: OptimizerCase,
    *,
    defaults: SGDOptions | None = None,
    budget: Budget = DEFAULT_BUDGET,
    state_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    may_move: bool = False,
    make_parameter: MakeParameter = torch.nn.Parameter,
    device: str = "cpu",
) -> None:
    """Assert that an SGD takes every step of a case right; arguments and errors as in `check_adam`."""
    options = defaults or SGDOptions()
    run = _Run(
        sgd_snapshot, sgd_errors, make_optimizer, case, options, budget, state_dtype, compute_dtype, may_move
    )
    _check(run, make_parameter, device)
