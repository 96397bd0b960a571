"""A step of one of two processes, each of which has one half of every tensor, is the step on whole tensors."""

import math
from types import SimpleNamespace

import pytest
import torch

from dragon.vm.torch.optim import SGD
from dragon.vm.torch.optim._backends.partials import SPAN
from dragon.vm.torch.optim._distributed import reduction
from dragon.vm.torch.optim._distributed.lanes import Lane
from dragon.vm.torch.optim._gradients.shared_norm import Reductions

from ..support import home, numbers

# The first has two partial norms, and one of the others has none.
TENSORS = [(SPAN + 3, torch.bfloat16), (5, torch.float32), (0, torch.float32), (9, torch.float32)]
# Of the gradients that are there, by step.
PRESENT = [(0, 1, 2, 3), (0, 2), (1, 3), (2,), (0, 1, 2, 3), (0, 1, 2, 3)]

# One plan for all sets of gradients.
pytestmark = pytest.mark.usefixtures("at_once")


@pytest.fixture
def other(monkeypatch):
    """Another process with equal halves; its `flag` is positive where it must skip.

    `must_skip` tells whether this process says so, or gives a norm of all gradients that is not finite.
    """
    process = SimpleNamespace(flag=0.0, must_skip=False)
    lanes = [Lane((None,), dict.fromkeys(range(len(TENSORS)), 1.0))]
    made = Reductions(reduction.Reduction(lanes), reduction.TensorReduction(lanes), torch.device("cpu"))

    def all_reduce(values, groups, op=None):
        process.must_skip = bool(values[0] > 0) or (len(values) == 2 and not math.isfinite(values[1]))
        if op is None:
            values *= 2
        values[0] += process.flag

    monkeypatch.setattr(reduction, "_all_reduce_sum", all_reduce)

    def share(optimizer):
        clips_each = any(group.get("clip_norm") for group in optimizer.param_groups)
        found = made if clips_each else made._replace(each=None)
        monkeypatch.setattr(optimizer._updater, "_find_reductions", lambda *args, **kwargs: found)

    process.share = share
    return process


def make(n_copies, backend, options):
    device = home(backend)
    params = [
        torch.nn.Parameter(numbers(i, numel, dtype=dtype, device=device).repeat(n_copies))
        for i, (numel, dtype) in enumerate(TENSORS)
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "grad_scale": 2.0}]
    return SGD(groups, lr=1.0, backend=backend, **options), params


def give(params, present, step, n_copies, value):
    for i, param in enumerate(params):
        numel = len(param) // n_copies
        grad = numbers(100 * step + i, numel, dtype=param.dtype, device=str(param.device))
        if numel and i == 3:
            grad[1] = value
        param.grad = grad.repeat(n_copies) if i in present else None


OPTIONS = [
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 0.5, "norm_type": math.inf},
    {"clip_norm": 0.5},
    {"skip_nonfinite": True},
    {"clip_norm": 0.5, "skip_nonfinite": True},
    {},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_step_of_two_processes_is_that_of_one_with_whole_tensors(backend, options, other):
    # Without a norm nothing is shared but what a scaler found. Without a scaler the fifth step is not finite.
    runs = [(None, math.nan if "norm_type" in options else math.inf)] if options else []
    for scale, value in (*runs, (4.0, 1.0)):
        half, params = make(1, backend, options)
        whole, others = make(2, backend, options)
        other.share(half)
        for step, present in enumerate(PRESENT):
            give(params, present, step, 1, value if step == 4 else 1.0)
            give(others, present, step, 2, value if step == 4 else 1.0)
            if scale is not None:
                # A scaler finds something on this process first, and then on the other one.
                own, other.flag = float(step == 2), float(step == 4)
                half.grad_scale = whole.grad_scale = torch.full((1,), scale)
                half.found_inf, whole.found_inf = torch.full((1,), own), torch.full((1,), max(own, other.flag))
            half.step()
            whole.step()
            assert half.n_skipped_steps == whole.n_skipped_steps, step
            if "skip_nonfinite" in options and step == 4:
                assert other.must_skip == (value != 1.0)
            if half.grad_norm is not None:
                torch.testing.assert_close(half.grad_norm, whole.grad_norm, rtol=1e-6, atol=0, equal_nan=True)
            for param, same in zip(params, others, strict=True):
                torch.testing.assert_close(param.detach(), same.detach()[: len(param)], equal_nan=True)
