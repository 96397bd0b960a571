"""Scale, clip, check, sum and average: the chain against the same one written out in extended precision."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import Budget, adam_errors, assert_within_budget
from dragon.vm.testing.wide import eps, wide
from dragon.vm.torch.optim import Adam, AdamW
from dragon.vm.torch.optim._options import complete

from .judging import options_of, snapshot
from .support import BACKENDS, everything, home, numbers, parameters, patient

# One more rounding of the gradient than a step without a chain: its factor is a number of fp32.
BUDGET = Budget(param=4, exp_avg=4, exp_avg_sq=8, max_exp_avg_sq=8)
each_backend, NON_FINITE = pytest.mark.parametrize("backend", BACKENDS), (math.inf, -math.inf, math.nan)


@dataclass(frozen=True)
class Micro:
    """One backward pass: which parameters get a gradient, of which size, and whether one element is spoilt."""

    binade: int
    absent: int
    zeros: bool
    spoilt: float | None


@dataclass(frozen=True)
class Step:
    """Backward passes, all but the last summed, and what a scaler hands over."""

    micros: tuple[Micro, ...]
    scale: float | None
    found_inf: float


@dataclass(frozen=True)
class Chain:
    """A run: tensors of one dtype in two groups, options of the optimizer and of its groups, and steps."""

    numels: tuple[int, ...]
    dtype: torch.dtype
    options: dict
    groups: tuple[dict, dict]
    steps: tuple[Step, ...]

    def make(self, backend):
        params = parameters([(n,) for n in self.numels], self.dtype, home(backend))
        groups = [{"params": params[i::2], **options} for i, options in enumerate(self.groups) if params[i::2]]
        return Adam(groups, backend=backend, **self.options), params


def micros(spoils):
    # 2**100 is 1e30, of which fp32 cannot hold the square; nor that of 2**-100. Factors stay normal fp32 numbers.
    return st.builds(
        Micro,
        st.sampled_from([0, 3, -10, 100, -100]),
        st.integers(0, 4),
        st.sampled_from([False] * 4 + [True]),
        spoils,
    )


spoils = st.sampled_from([None] * 6 + list(NON_FINITE))
steps = st.builds(
    Step,
    st.lists(micros(spoils), min_size=1, max_size=3).map(tuple),
    st.sampled_from([None, None, 2.0**10, 3.0]),
    st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0]),
)
common = {"lr": st.sampled_from([1e-3, 0.1]), "grad_scale": st.sampled_from([1.0, 0.1, 2.0])}
group_options = st.fixed_dictionaries(
    {}, optional={**common, "maximize": st.booleans(), "ema_decay": st.sampled_from([0.9, 0.999])}
)
clipped = st.fixed_dictionaries(
    {}, optional={"clip_norm": st.sampled_from([1.0, 1e-3]), "clip_value": st.sampled_from([0.5, 1e-3])}
)
bounded = st.fixed_dictionaries(
    {"max_grad_norm": st.sampled_from([1.0, 100.0, 1e20])},
    optional={"norm_type": st.sampled_from([2, 2.0, math.inf])},
)
flags = st.fixed_dictionaries(
    {},
    optional={
        "skip_nonfinite": st.booleans(),
        "amsgrad": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "epsilon_hat": st.booleans(),
        "betas": st.sampled_from([(0.9, 0.95), (0.0, 0.999)]),
    },
)
options = st.builds(lambda limit, rest: {**limit, **rest}, bounded | clipped, flags)
numels = st.lists(st.sampled_from([0, 1, 15, 17, 40]), min_size=1, max_size=3).map(tuple)


def chains(dtypes):
    pair = st.tuples(group_options, group_options)
    return st.builds(
        Chain, numels, st.sampled_from(dtypes), options, pair, st.lists(steps, min_size=1, max_size=2).map(tuple)
    )


def give_micro(params, micro, seed, scale):
    """Give the parameters of one backward pass their gradients, times a scaler's scale."""
    for i, param in enumerate(params):
        param.grad = None
        if i == micro.absent:
            continue
        grad = numbers(seed + i, *param.shape, dtype=torch.float64) * 2.0**micro.binade * (not micro.zeros) * scale
        if micro.spoilt is not None and grad.numel() and i == len(params) - 1:
            grad[0] = micro.spoilt
        param.grad = grad.to(param.device, param.dtype)


def sums_of(params, step, seed):
    """The gradients of all passes, summed in fp32 or wider; None for a parameter that got none."""
    total = [None] * len(params)
    for number, micro in enumerate(step.micros):
        give_micro(params, micro, seed + 100 * number, step.scale or 1.0)
        for i, param in enumerate(params):
            if param.grad is not None:
                grad = param.grad.to(torch.promote_types(param.dtype, torch.float32))
                total[i] = grad if total[i] is None else total[i] + grad
    return total


def complete_groups(optimizer):
    """For each parameter its group, with the options that the group need not hold."""
    own = optimizer._algorithm.own_defaults
    return {param: complete(group, own) for group in optimizer.param_groups for param in group["params"]}


@np.errstate(all="ignore")
def chain_of(optimizer, params, grads, scale):
    """What the update shall see of each gradient, and the norm of all."""
    group_of = complete_groups(optimizer)
    settings = optimizer._settings
    ready = [
        None if g is None else wide(g) * group_of[p]["grad_scale"] / (scale or 1.0)
        for p, g in zip(params, grads, strict=True)
    ]
    present = [g for g in ready if g is not None and g.size]
    if settings.norm_type == math.inf:
        norm = max((np.max(abs(g)) for g in present), default=np.longdouble(0))
        norm = np.longdouble(math.nan) if any(np.isnan(g).any() for g in present) else norm
    else:
        norm = np.sqrt(sum((np.sum(g * g) for g in present), np.longdouble(0)))
    for i, param in enumerate(params):
        if ready[i] is None:
            continue
        group = group_of[param]
        if settings.max_grad_norm:
            ready[i] = ready[i] * np.minimum(settings.max_grad_norm / (norm + np.longdouble(1e-6)), 1)
        if group["clip_norm"]:
            own = np.sqrt(np.sum(ready[i] * ready[i]))
            ready[i] = ready[i] * (np.minimum(group["clip_norm"] / own, 1) if own != 0 else 1)
        elif group["clip_value"]:
            ready[i] = np.clip(ready[i], -group["clip_value"], group["clip_value"])
    return ready, norm


def check_step(optimizer, params, step, seed):
    """Take one step and judge it from its own start."""
    grads = sums_of(params, step, seed)
    ready, norm = chain_of(optimizer, params, grads, step.scale)
    for number, micro in enumerate(step.micros):
        give_micro(params, micro, seed + 100 * number, step.scale or 1.0)
        if number < len(step.micros) - 1:
            optimizer.sum_grad()
    optimizer.grad_scale = None if step.scale is None else torch.tensor([step.scale], device=params[0].device)
    optimizer.found_inf = torch.tensor([step.found_inf], device=params[0].device)
    group_of = complete_groups(optimizer)
    starts = [snapshot(p, optimizer.state.get(p, {}), group_of[p]["amsgrad"]) for p in params]
    averages = [optimizer.state.get(p, {}).get("ema", p).detach().clone() for p in params]
    before, n_skipped = everything(optimizer), optimizer.n_skipped_steps
    optimizer.step()
    seen = [g for g in ready if g is not None]
    if not seen:
        assert everything(optimizer) == before
        return
    skipped = step.found_inf > 0 or (optimizer._settings.skip_nonfinite and not np.isfinite(norm))
    assert optimizer.n_skipped_steps == n_skipped + skipped
    if skipped:
        assert_untouched(optimizer, params, starts)
        return
    if optimizer._settings.max_grad_norm or optimizer._settings.skip_nonfinite:
        assert_norm(optimizer.grad_norm, norm)
    for i, param in enumerate(params):
        group, state = group_of[param], optimizer.state.get(param, {})
        if ready[i] is None:
            continue
        after = snapshot(param, state, group["amsgrad"])
        judged = replace(options_of(group), grad_scale=1.0)
        judged_grad = torch.from_numpy(ready[i].astype(np.float64))
        assert_within_budget(
            adam_errors(starts[i], judged_grad, after, judged), BUDGET, f"parameter {i}, {judged}"
        )
        if group["ema_decay"]:
            assert_average(averages[i], param, state["ema"], group["ema_decay"])


def assert_untouched(optimizer, params, starts):
    for param, start in zip(params, starts, strict=True):
        state = optimizer.state.get(param, {})
        assert torch.equal(param.detach().cpu(), start.param.view_as(param)) or param.isnan().any()
        assert float(state.get("step", 0)) == start.step
        for name in ("exp_avg", "exp_avg_sq"):
            expected = getattr(start, name)
            assert torch.equal(state.get(name, torch.zeros_like(param)).cpu(), expected) or expected.isnan().any()


def assert_norm(found, expected):
    assert found.dtype == torch.float64
    found = float(found)
    if np.isfinite(expected):
        assert abs(found - expected) <= 4 * eps(torch.float64) * expected
    else:
        assert found == expected or (math.isnan(found) and np.isnan(expected))


@np.errstate(all="ignore")
def assert_average(before, param, after, decay):
    start, target = wide(before), wide(param)
    expected = start + (1 - np.longdouble(decay)) * (target - start)
    bound = 3 * eps(after.dtype) * np.maximum(abs(start), abs(target)) + torch.finfo(after.dtype).tiny
    wrong = abs(wide(after) - expected) > bound
    assert not (wrong & np.isfinite(expected)).any()


@each_backend
@patient
@given(data=st.data())
def test_the_chain_is_as_right_as_a_step_without_it(backend, data):
    chain = data.draw(chains([torch.float32] if backend == "native" else [torch.float32, torch.float64]))
    if backend == "native":
        # The maximum of torch's fused operation forgets a NaN.
        chain = replace(chain, options={**chain.options, "amsgrad": False})
    optimizer, params = chain.make(backend)
    for number, step in enumerate(chain.steps):
        check_step(optimizer, params, step, 10_000 * number)


def torchs_chain(params, optimizer, scaler, limit):
    """One step as PyTorch's users write it."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, limit)
    scaler.step(optimizer)
    scaler.update()
    return norm


@each_backend
@patient
@given(
    st.lists(st.sampled_from([0.0, 1.0, 50.0, math.inf]), min_size=1, max_size=4), st.sampled_from([0.5, 100.0])
)
def test_a_scaled_and_clipped_run_is_pytorchs(backend, sizes, limit):
    device = home(backend)
    ours, theirs = (parameters([(7,), (3, 5)], device=device) for _ in range(2))
    # Next to a small epsilon one factor of all gradients would change nothing.
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 0.1}
    optimizer = AdamW(ours, backend=backend, epsilon_hat=False, max_grad_norm=limit, fused=True, **options)
    reference = torch.optim.AdamW(theirs, **options)
    scalers = [torch.amp.GradScaler(torch.device(device).type, init_scale=2.0**10) for _ in range(2)]
    for number, size in enumerate(sizes):
        for params, scaler in zip((ours, theirs), scalers, strict=True):
            for param in params:
                param.grad = None
            loss = sum((param * numbers(number, *param.shape, device=device)).sum() for param in params) * size
            scaler.scale(loss).backward()
            if params is ours:
                scaler.step(optimizer)
                scaler.update()
            else:
                norm = torchs_chain(params, reference, scaler, limit)
        if math.isfinite(size):
            torch.testing.assert_close(optimizer.grad_norm.float(), norm)
        torch.testing.assert_close(ours, theirs)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert optimizer.n_skipped_steps == sum(map(math.isinf, sizes))


@pytest.mark.parametrize(("backend", "numel"), [("triton", 40_000), ("native", 10**6), ("eager", 10**6)])
@pytest.mark.parametrize("spoilt", NON_FINITE)
@pytest.mark.parametrize("norm_type", [2, math.inf])
def test_one_element_that_is_not_finite_skips_the_step(backend, numel, spoilt, norm_type):
    params = parameters([(5,), (numel,)], device=home(backend))
    optimizer = Adam(params, backend=backend, skip_nonfinite=True, norm_type=norm_type)
    for param in params:
        param.grad = torch.ones_like(param)
    params[1].grad[numel // 2] = spoilt
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert optimizer.n_skipped_steps == 1
    assert all(map(torch.equal, before, params))
    assert all(state["step"] == 0 for state in optimizer.state.values())
    params[1].grad[numel // 2] = 1.0
    optimizer.step()
    assert optimizer.n_skipped_steps == 1
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert float(optimizer.grad_norm) == (1.0 if norm_type == math.inf else math.sqrt(5 + numel))


@each_backend
@pytest.mark.parametrize(
    "clip", [{"max_grad_norm": 1.0}, {"clip_norm": 1.0}, {"max_grad_norm": 1.0, "norm_type": math.inf}]
)
def test_a_zero_gradient_has_norm_zero_and_is_not_divided_by_it(backend, clip):
    params = parameters([(5,), (0,)], device=home(backend))
    optimizer = Adam(params, backend=backend, **clip)
    for param in params:
        param.grad = torch.zeros_like(param)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(before, params[0])
    if "max_grad_norm" in clip:
        assert float(optimizer.grad_norm) == 0.0


@each_backend
@pytest.mark.parametrize("limit", [{"max_grad_norm": 1.0}, {"clip_norm": 1.0}, {"skip_nonfinite": True}])
@pytest.mark.parametrize("spoilt", [None, math.inf])
def test_tensors_that_go_the_eager_way_share_the_norm_and_the_verdict(backend, limit, spoilt):
    def make(chosen, contiguous):
        base = numbers(3, 6, 2, device=home(chosen))
        stray = base[:, 0].clone() if contiguous else base[:, 0]
        params = [torch.nn.Parameter(numbers(2, 9, device=home(chosen))), torch.nn.Parameter(stray)]
        for i, param in enumerate(params):
            param.grad = numbers(5 + i, *param.shape, device=home(chosen)) * 10
        if spoilt is not None:
            params[0].grad[3] = spoilt
        # Without the epsilon a first step of Adam would be the same for any norm.
        return Adam(params, lr=0.1, eps=1.0, backend=chosen, **limit), params

    mixed, params = make(backend, False)
    plain, expected = make("eager", True)
    for optimizer in (mixed, plain):
        optimizer.step()
    assert mixed.n_skipped_steps == plain.n_skipped_steps
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().cpu(), other.detach(), equal_nan=True)


@each_backend
def test_the_norm_is_that_of_the_last_step_whoever_took_it(backend):
    base = numbers(3, 6, 2, device=home(backend))
    params = [torch.nn.Parameter(numbers(2, 9, device=home(backend))), torch.nn.Parameter(base[:, 0])]
    optimizer = Adam(params, backend=backend, max_grad_norm=1.0)
    for values in ((3.0, 4.0), (2.0, None), (1.0, 2.0)):
        for param, value in zip(params, values, strict=True):
            param.grad = None if value is None else torch.full_like(param, value)
        squares = [param.grad.double().square().sum() for param in params if param.grad is not None]
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(sum(squares)), rel=1e-15, abs=0)


@each_backend
def test_a_skipped_step_zeroes_the_gradients_if_asked_to(backend):
    params = parameters([(5,), (33,)], device=home(backend))
    optimizer = Adam(params, backend=backend, skip_nonfinite=True)
    for param in params:
        param.grad = torch.full_like(param, math.nan)
    optimizer.step(zero_grad=True)
    assert optimizer.n_skipped_steps == 1
    assert all(not param.grad.any() for param in params)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_gradients_are_float32(backend, dtype):
    param, twice = (parameters([(5,)], dtype, home(backend))[0] for _ in range(2))
    options = {"state_dtype": torch.float32}
    summed, plain = Adam([param], backend=backend, **options), Adam([twice], backend="eager", **options)
    for value in (1.0, 2.0**-12, 2.0**-12):
        param.grad = torch.full_like(param, value)
        summed.sum_grad()
    assert param.grad is None
    summed.step()
    twice.grad_dtype = torch.float32
    twice.grad = torch.full((5,), 1 + 2.0**-11, device=twice.device)
    plain.step()
    expected = plain.state[twice]["exp_avg_sq"]
    torch.testing.assert_close(summed.state[param]["exp_avg_sq"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(param, twice)
