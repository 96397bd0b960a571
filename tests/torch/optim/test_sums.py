"""`sum_grad`: sums in float32 or wider, one operation a call, and never anybody else's memory."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import SGD, Adam, _sums
from dragon.vm.torch.optim._backends import triton
from dragon.vm.torch.optim._distributed import unreduced

from .support import home

BACKENDS = ["native", "triton", "eager"]
SHAPES = [(3, 5), (1100,), (), (0,)]


def raiser(error):
    def fail(*args, **named):
        raise error

    return fail


def parameters(dtype, device):
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in SHAPES]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    history=st.lists(st.tuples(st.lists(st.booleans(), min_size=4, max_size=4), st.booleans()), max_size=5),
    seed=st.integers(0, 1000),
)
def test_a_step_uses_the_sum_and_what_came_after_it(backend, dtype, history, seed):
    params = parameters(dtype, home(backend))
    optimizer = SGD(params, lr=1.0, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    totals = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    magnitudes = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for present, summed in history:
        for param, total, magnitude, has_grad in zip(params, totals, magnitudes, present, strict=True):
            if has_grad:
                grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
                own = grad.clone().to(param.device)
                param.grad = own if param.grad is None else param.grad + own
                total += grad.double()
                magnitude += grad.double().abs()
        if summed:
            optimizer.sum_grad()
            assert all(param.grad is None for param in params)
    optimizer.step()
    for param, total, magnitude in zip(params, totals, magnitudes, strict=True):
        # Additions outside the sum round to the parameter's dtype, up to one for each backward pass.
        allowed = (len(history) + 2) * torch.finfo(dtype).eps * magnitude
        assert ((param.detach().cpu().double() + total).abs() <= allowed).all()
    assert not optimizer._sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_keep_what_half_precision_loses(dtype):
    param = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = Adam([param])
    for value in (256.0, *[0.25] * 8):
        param.grad = torch.full((4,), value, dtype=dtype)
        optimizer.sum_grad()
    assert optimizer._sums.totals[param].dtype == torch.float32
    assert (optimizer._sums.totals[param] == 258).all()


def test_memory_that_somebody_else_may_write_to_is_copied():
    bucket = torch.ones(8)
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = SGD([param], lr=1.0)
    param.grad = bucket.view(8)
    optimizer.sum_grad()
    bucket.fill_(5)
    param.grad = bucket.view(8)
    optimizer.sum_grad()
    optimizer.step()
    assert (param == -6).all()


def test_a_call_that_fails_loses_no_gradient(monkeypatch):
    params = parameters(torch.float32, "cpu")
    optimizer = SGD(params, lr=1.0)
    params[0].grad = torch.ones_like(params[0])
    optimizer.sum_grad()
    for param in params:
        param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(_sums, "in_layout_of", raiser(MemoryError))
        with pytest.raises(MemoryError):
            optimizer.sum_grad()
    optimizer.sum_grad()
    optimizer.step()
    assert (params[0] == -2).all()
    assert all((param == -1).all() for param in params[1:])


def test_sums_that_wait_for_other_processes_lose_no_gradient(monkeypatch):
    params = parameters(torch.float32, "cpu")
    for param in params:
        param.grad = torch.ones_like(param)
    sums = unreduced.UnreducedSums(unreduced.BufferKey(None, torch.device("cpu"), torch.float32), params)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_add_", raiser(MemoryError))
        with pytest.raises(MemoryError):
            sums.take()
    sums.take()
    assert all(torch.equal(view, torch.ones_like(param)) for view, param in zip(sums._views, params, strict=True))
    assert all(param.grad is None for param in params)


def test_an_interrupted_first_launch_spoils_no_later_sum(monkeypatch):
    param = torch.nn.Parameter(torch.zeros(5, device=home("triton")))
    optimizer = SGD([param], lr=1.0, backend="triton")
    for n in range(4):
        param.grad = torch.ones_like(param)
        with monkeypatch.context() as patch:
            if n == 1:
                # It compiles a kernel, for seconds.
                patch.setattr(triton.DeviceContext, "launch", raiser(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    optimizer.sum_grad()
                continue
        optimizer.sum_grad()
    optimizer.step()
    assert (param == -3).all()


def test_zero_grad_leaves_the_sum_alone_and_a_copy_takes_it_along():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=True)
    twin_param, twin = copy.deepcopy((param, optimizer))
    for each, its in ((param, optimizer), (twin_param, twin)):
        its.step()
        assert (each == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_uses_the_sum_up(backend):
    param = torch.nn.Parameter(torch.zeros(3, device=home(backend)))
    optimizer = SGD([param], lr=1.0, backend=backend, skip_nonfinite=True)
    param.grad = torch.tensor([1.0, float("inf"), 1.0]).to(param.device)
    optimizer.sum_grad()
    optimizer.step()
    assert (param == 0).all()
    assert optimizer.n_skipped_steps == 1
    param.grad = torch.ones_like(param)
    optimizer.sum_grad()
    optimizer.step()
    assert (param == -1).all()


def test_gradients_of_another_layout_are_summed_element_by_element():
    for backend in BACKENDS:
        where = torch.device(home(backend))
        param = torch.nn.Parameter(torch.zeros(4, 3, device=where))
        optimizer = SGD([param], lr=1.0, backend=backend)
        with where:
            grads = [torch.randn(4, 3), torch.randn(3, 4).t(), torch.randn(4, 6)[:, ::2]]
        expected = -sum(grads)
        for grad in grads:
            param.grad = grad
            optimizer.sum_grad()
        optimizer.step()
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-6)


def scaled(optimizer_of, n_parts, summed, *, scale=1024.0, broken=None, is_last_summed=False):
    """Two steps of parts that a scaler scales; the parameter, the scale, and whether the step was taken."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = optimizer_of([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(2):
        for part in range(n_parts):
            factor = float("inf") if broken == (step, part) else 1.0 + part
            scaler.scale(param.sum() * factor).backward()
            if summed and (is_last_summed or part < n_parts - 1):
                optimizer.sum_grad()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return param.tolist(), scaler.get_scale(), len(optimizer._sums.totals)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("is_last_summed", [False, True])
@pytest.mark.parametrize("broken", [None, (0, 0), (0, 1), (1, 0)], ids=str)
def test_a_scaler_unscales_and_checks_sums_like_gradients(backend, fused, is_last_summed, broken, interpreted):
    def ours(params):
        return SGD(params, lr=1.0, fused=fused, backend=backend)

    def theirs(params):
        return torch.optim.SGD(params, lr=1.0)

    found = scaled(ours, 2, True, broken=broken, is_last_summed=is_last_summed)
    assert found == scaled_without_sums(theirs, broken)


def scaled_without_sums(make, broken):
    class Plain(torch.optim.SGD):
        _sums = type("Nothing", (), {"totals": ()})

    return scaled(lambda params: Plain(params, lr=1.0), 2, False, broken=broken)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("has_grad", [False, True])
def test_sums_that_a_scaler_did_not_unscale_are_refused_before_anything_is_written(fused, has_grad):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(param.sum()).backward()
    optimizer.sum_grad()
    if has_grad:
        scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) saw no sums of sum_grad\(\)"):
        scaler.step(optimizer)
    assert param.tolist() == [0, 0, 0]
    # Without the sums the next iteration is as any other.
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert param.tolist() == [-1, -1, -1]


def test_sums_of_half_precision_are_handed_to_a_scaler_in_the_dtype_of_gradients():
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = SGD([param], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(3):
        scaler.scale(param.sum()).backward()
        optimizer.sum_grad()
    scaler.step(optimizer)
    assert param.tolist() == [-3, -3, -3]


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32, None])
def test_sums_are_handed_over_in_the_dtype_that_gradients_may_have(grad_dtype):
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    param.grad_dtype = grad_dtype
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3, dtype=grad_dtype or torch.float32)
    optimizer.sum_grad()
    assert optimizer._step_supports_amp_scaling
    assert param.grad.dtype == (grad_dtype or torch.float32)


def test_sums_that_a_scaler_found_end_with_the_step_that_used_or_skipped_them():
    for broken in (None, 1):
        param = torch.nn.Parameter(torch.zeros(3))
        optimizer = SGD([param], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            # As in the guide: nobody calls zero_grad().
            for part in range(2):
                scaler.scale(param.sum() * (float("inf") if (step, part) == (broken, 0) else 1.0)).backward()
                optimizer.sum_grad()
            scaler.step(optimizer)
            scaler.update()
            assert param.grad is None
        assert param.tolist() == [-8.0 if broken is None else -6.0] * 3


def test_a_scaler_leaves_gradients_beside_sums():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = SGD(params, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(params[0].sum()).backward()
    optimizer.sum_grad()
    scaler.scale(params[1].sum()).backward()
    scaler.step(optimizer)
    assert [param.tolist() for param in params] == [[-1.0] * 3, [-1.0] * 3, [0.0] * 3]
    assert [param.grad is None for param in params] == [True, False, True]
    assert params[1].grad.tolist() == [1.0] * 3


def test_who_only_looks_whether_a_step_unscales_loses_no_sum():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    assert [optimizer._step_supports_amp_scaling for _ in range(2)] == [True, True]
    optimizer.zero_grad()
    assert len(optimizer._sums.totals) == 1
    assert not optimizer._step_supports_amp_scaling or optimizer.step() is None
    assert param.tolist() == [-1.0] * 3
    assert optimizer._step_supports_amp_scaling is False


def test_a_sparse_gradient_is_refused_before_anything_is_summed():
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = SGD(params, lr=1.0)
    grads = [torch.ones(4), torch.ones(4).to_sparse()]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    with pytest.raises(RuntimeError, match=r"does not support gradients of layout torch.sparse_coo"):
        optimizer.sum_grad()
    assert [param.grad for param in params] == grads
    params[1].grad = None
    optimizer.sum_grad()
    optimizer.step()
    assert (params[0] == -1).all()


def test_sums_that_autograd_could_not_see_are_refused():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = SGD([param], differentiable=True)
    grad = param.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="differentiable=True: autograd would not see the sum"):
        optimizer.sum_grad()
    assert param.grad is grad


def test_sums_of_inference_mode_can_be_added_to():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    with torch.inference_mode():
        param.grad = torch.ones(3)
        optimizer.sum_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    optimizer.step()
    assert param.tolist() == [-2.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("total", [torch.ones(1), torch.ones(4), torch.ones(3).to(int), 1.0], ids=str)
def test_a_saved_sum_of_another_kind_is_refused_before_anything_changes(total, dtype):
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = SGD([param], lr=1.0)
    saved = optimizer.state_dict()
    other = torch.ones(3, dtype=torch.complex64 if dtype == torch.float32 else torch.float32)
    saved["param_groups"][0]["lr"] = 3.0
    for each in (total, other):
        saved["state"] = {0: {"grad_sum": each}}
        with pytest.raises(ValueError, match=rf"grad_sum of .* for a parameter of {dtype} and shape"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1.0
        assert not optimizer._sums


def test_saved_sums_take_the_place_of_all_that_there_are():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = SGD(params, lr=1.0)
    params[0].grad = torch.ones(3)
    optimizer.sum_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    params[1].grad = torch.ones(3)
    optimizer.sum_grad()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert [param.tolist() for param in params] == [[-1.0] * 3, [0.0] * 3]


def test_a_saved_sum_is_refused_by_an_optimizer_that_releases_gradients():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.sum_grad()
    other = SGD([torch.nn.Parameter(torch.zeros(3))], lr=3.0, release_gradients=True)
    with pytest.raises(ValueError, match="release_gradients=True would leave unused"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shapes", [((4,), (2, 4)), ((2, 4), (4,)), ((4,), (2, 3))])
def test_a_parameter_of_another_shape_than_its_sum_is_refused(backend, shapes):
    before, after = (torch.ones(shape, device=home(backend)) for shape in shapes)
    param = torch.nn.Parameter(before)
    optimizer = SGD([param], lr=1.0, backend=backend)
    param.grad = torch.ones_like(before)
    optimizer.sum_grad()
    param.data = after.clone()
    param.grad = torch.ones_like(after)
    for call in (optimizer.sum_grad, optimizer.step):
        with pytest.raises(ValueError, match=f"{re.escape(str(shapes[0]))}, but now their parameter has shape"):
            call()
    assert torch.equal(param, after)
    param.data = before.clone()
    param.grad = None
    optimizer.step()
    assert torch.equal(param, torch.zeros_like(before))
