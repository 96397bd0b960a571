"""Buckets of released gradients: how they are filled, and what a scaler is told of them."""

import gc
import weakref

import pytest
import torch
from torch import nn

from dragon.vm.torch.optim import SGD, _release


def two_buckets(monkeypatch):
    """Two parameters in a bucket each, a scaler, and an optimizer that releases their gradients."""
    monkeypatch.setattr(_release, "BUCKET_BYTES", 4 * 64)
    params = [nn.Parameter(torch.ones(64)) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return *params, scaler, SGD(params, lr=1.0, release_gradients=scaler)


def test_each_bucket_is_filled_before_the_next_begins(monkeypatch):
    monkeypatch.setattr(_release, "BUCKET_BYTES", 4 * 16)
    params = [nn.Parameter(torch.ones(4)) for _ in range(9)]
    optimizer = SGD(params, release_gradients=True)
    sum(param.sum() for param in params).backward()
    buckets = optimizer._release._buckets
    assert [len(bucket.params) for bucket in buckets] == [4, 4, 1]
    optimizer.step()
    sum(param.sum() for param in params).backward()
    assert optimizer._release._buckets is buckets, "arranged anew for the same parameters"


def test_a_bucket_is_whole_while_its_parameters_are_there():
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    bucket = _release.Bucket(1, [(0, params[1]), (0, params[0])], 1)
    assert bucket.is_whole
    del params[0]
    assert not bucket.is_whole


@pytest.mark.parametrize("is_first", [False, True])
def test_a_scaler_that_unscales_finds_what_was_released_before_and_behind_the_last_bucket(is_first, monkeypatch):
    """Gradients of the last bucket, the first parameters, arrive before the others here, or behind them."""
    monkeypatch.setattr(_release, "BUCKET_BYTES", 4 * 64)
    kept, others = nn.Parameter(torch.ones(4)), [nn.Parameter(torch.ones(64)) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = SGD([kept, *others], lr=1.0, release_gradients=scaler)
    losses = [kept.sum(), sum((other * torch.inf).sum() for other in others)]
    for loss in losses if is_first else reversed(losses):
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert torch.equal(kept, torch.ones(4))


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_parameters_that_are_all_exchanged_or_frozen_at_first_are_released_behind_the_first_step(is_exchanged):
    params = [nn.Parameter(torch.ones(64), requires_grad=is_exchanged) for _ in range(2)]
    # As Accelerate does for FSDP2.
    built_with = [torch.empty_like(param) for param in params] if is_exchanged else params
    optimizer = SGD(built_with, lr=1.0, release_gradients=True)
    optimizer.param_groups[0]["params"] = params
    for n_steps in (1, 2, 3):
        sum(param.requires_grad_(True).sum() for param in params).backward()
        assert [param.grad is None for param in params] == [n_steps > 1] * 2
        optimizer.step()
        assert all(torch.equal(param, torch.ones(64) - n_steps) for param in params)


@pytest.mark.parametrize("factor", [1.0, torch.inf])
def test_a_scaler_finds_what_was_released_before_a_group_came(factor, monkeypatch):
    _, trained, scaler, optimizer = two_buckets(monkeypatch)
    scaler.scale((trained * factor).sum()).backward()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(64))]})
    scaler.step(optimizer)
    scaler.update()
    is_skipped = factor == torch.inf
    assert scaler.get_scale() == (2.0 if is_skipped else 4.0)
    assert trained.tolist() == [float(is_skipped)] * 64


@pytest.mark.parametrize("n_elements", [64, 128], ids=["a bucket of its own", "the same bucket"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_group_in_any_bucket_hides_no_second_pass(n_elements, is_trained, monkeypatch):
    monkeypatch.setattr(_release, "BUCKET_BYTES", 4 * n_elements)
    param, late = (nn.Parameter(torch.ones(64)) for _ in range(2))
    optimizer = SGD([param], lr=1.0, release_gradients=True)
    param.sum().backward()
    optimizer.add_param_group({"params": [late]})
    with pytest.raises(RuntimeError, match="second backward pass"):
        (param + late if is_trained else param).sum().backward()
    assert param.tolist() == [0.0] * 64


def test_a_scaler_finds_nothing_of_a_backward_pass_that_was_given_up(monkeypatch):
    _, trained, scaler, optimizer = two_buckets(monkeypatch)
    scaler.scale((trained * torch.inf).sum()).backward()
    optimizer.zero_grad()
    scaler.scale(trained.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert trained.tolist() == [0.0] * 64


def test_a_parameter_that_another_has_replaced_is_left_alone():
    old, new = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SGD([old], lr=1.0, release_gradients=True)
    old.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new
    (old + new).sum().backward()
    optimizer.step()
    assert old.tolist() == [0.0] * 3
    assert new.tolist() == [0.0] * 3


def test_who_asks_for_unscaling_without_a_scaler_changes_nothing(monkeypatch):
    """As PyTorch Lightning does before it clips."""
    unused, trained, scaler, optimizer = two_buckets(monkeypatch)
    scaler.scale(trained.sum()).backward()
    assert optimizer._step_supports_amp_scaling
    assert unused.grad is None, "a gradient for no scaler"


def test_an_optimizer_is_freed_without_the_garbage_collector():
    param = nn.Parameter(torch.ones(4))
    gc.disable()
    try:
        # PyTorch imports what it needs at the first construction of a process, which leaves frames behind.
        for _ in range(2):
            optimizer = SGD([param], lr=1.0, release_gradients=True)
            param.sum().backward()
            gone = weakref.ref(optimizer)
            del optimizer
        assert gone() is None
    finally:
        gc.enable()
    param.sum().backward()
    assert param.grad is not None
