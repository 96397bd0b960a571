"""Gradient release: the bits of the plain step, with one bucket's gradients alive at a time."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from dragon.vm.torch.optim import SGD, Adam, AdamW, _release

N_STEPS = 4
BACKENDS = ["native", "eager", "triton"]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """A bucket holds the weight of one layer of `net`."""
    monkeypatch.setattr(_release, "BUCKET_BYTES", 4 * 8 * 8)


def net(depth=5):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers)


def batch(step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def loss_of(model, step):
    x = batch(step).to(next(model.parameters()).dtype)
    return model(x).float().square().sum()


def trained(make, model=None, n_steps=N_STEPS, after=lambda optimizer: None):
    model = model or net()
    optimizer = make(model.parameters())
    for step in range(n_steps):
        loss_of(model, step).backward()
        optimizer.step()
        after(optimizer)
        optimizer.zero_grad()
    return list(model.parameters()), optimizer


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"amsgrad": True, "ema_decay": 0.9}], ids=str)
def test_released_gradients_give_the_bits_of_the_plain_step(backend, options):
    expected, plain = trained(lambda params: AdamW(params, lr=0.02, backend=backend, **options))
    found, released = trained(
        lambda params: AdamW(params, lr=0.02, backend=backend, release_gradients=True, **options)
    )
    assert same(found, expected)
    saved, other = released.state_dict(), plain.state_dict()
    assert saved["param_groups"] == other["param_groups"]
    for index, state in other["state"].items():
        assert all(torch.equal(state[key], saved["state"][index][key]) for key in state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"master_weights": "split16"}, {"stochastic_rounding": True}, {"state_dtype": "8bit"}], ids=str
)
def test_memory_modes_keep_their_bits(backend, options):
    runs = [
        trained(
            lambda params, r=release: AdamW(params, lr=0.02, backend=backend, release_gradients=r, **options),
            net().bfloat16(),
        )
        for release in (False, True)
    ]
    assert same(runs[0][0], runs[1][0])


def test_groups_and_schedules_go_on():
    runs = []
    for release in (False, True):
        model = net()
        params = list(model.parameters())
        optimizer = SGD(
            [{"params": params[::2], "lr": 0.1}, {"params": params[1::2]}],
            lr=0.02,
            momentum=0.9,
            release_gradients=release,
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(N_STEPS):
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        runs.append(params)
    assert same(*runs)


def live_bytes(release):
    """The largest number of bytes of gradients that are alive at once in a step."""
    model = net(20)
    optimizer = AdamW(model.parameters(), release_gradients=release)
    largest = 0

    def measure(*_):
        nonlocal largest
        largest = max(largest, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    # They run behind those of the optimizer, which were registered first.
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(measure)
    loss_of(model, 0).backward()
    optimizer.step()
    return largest


def test_few_gradients_are_alive_at_once():
    total = sum(param.nbytes for param in net(20).parameters())
    assert live_bytes(False) == total
    # A bucket, and the layer whose gradients arrive.
    assert live_bytes(True) <= 2 * (4 * 8 * 8 + 4 * 8) < total / 8


def test_each_bucket_has_one_plan_that_is_prepared_once():
    seen, make = [], lambda params: AdamW(params, release_gradients=True)
    _, optimizer = trained(make, after=lambda o: seen.append(o._updater.plans.latest()))
    # The first backward pass prepares a bucket before the later ones have states.
    assert len(seen[1]) == len(optimizer._release._buckets) > 4
    assert all(set(map(id, plans)) == set(map(id, seen[1])) for plans in seen[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaler_skips_bucket_by_bucket_and_lowers_its_scale(backend):
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    optimizer = SGD(model.parameters(), lr=0.5, backend=backend, release_gradients=scaler)
    poisoned = model[4].weight
    handle = None
    scales, changed = [], []
    for step in range(3):
        if step == 1:
            handle = poisoned.register_hook(lambda grad: grad * torch.inf)
        before = [param.detach().clone() for param in model.parameters()]
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if handle:
            handle.remove()
        scales.append(scaler.get_scale())
        changed.append([not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)])
    names = [name for name, _ in model.named_parameters()]
    assert scales == [4.0, 2.0, 2.0]
    assert all(changed[0])
    assert all(changed[2])
    # Its bucket, and what waited for the step.
    skipped = {name for name, is_changed in zip(names, changed[1], strict=True) if not is_changed}
    assert "4.weight" in skipped
    assert "0.weight" in skipped
    assert {"8.weight", "8.bias", "6.weight"} <= set(names) - skipped


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_gradients_give_the_bits_of_unscaled_ones(backend):
    expected, _ = trained(lambda params: AdamW(params, backend=backend))
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AdamW(model.parameters(), backend=backend, release_gradients=scaler)
    for step in range(N_STEPS):
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert same(model.parameters(), expected)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaler_finds_what_was_released_where_no_gradient_is_left(backend, is_frozen):
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1, backend=backend, release_gradients=scaler)
    last = [param for param in model.parameters() if id(param) in optimizer._release._buckets[-1].ids]
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before = [param.detach().clone() for param in last]
    if is_frozen:
        for param in last:
            param.requires_grad_(False)
    handle = None
    scales = []
    for step in range(1, 5):
        if step == 4:
            handle = model[4].weight.register_hook(lambda grad: grad * torch.inf)
        n_unused = 0 if is_frozen else 2
        scaler.scale(model[n_unused:](batch(step)).square().sum()).backward()
        # A bucket of others is the last one where its layers are frozen, and keeps its gradients for the scaler.
        kept = [param for param in model.parameters() if param.grad is not None]
        assert bool(kept) == is_frozen
        scaler.step(optimizer)
        assert all(param.grad is None for param in model.parameters())
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    handle.remove()
    assert scales == [8.0, 8.0, 16.0, 8.0]
    assert optimizer.n_skipped_steps > 0
    # The gradient of zeros that the scaler was given updated nothing.
    assert same(last, before)
    assert [float(optimizer.state[param]["step"]) for param in last] == [1.0] * len(last)


def test_a_scaler_that_unscaled_before_it_was_told_is_refused():
    model = net()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AdamW(model.parameters(), release_gradients=scaler)
    scaler.scale(model[2:](batch(0)).square().sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="Leave unscale_\\(\\) out"):
        scaler.step(optimizer)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("is_named", [False, True])
def test_an_unknown_scaler_is_noticed(is_named):
    scaler, model = torch.amp.GradScaler("cpu"), net()
    optimizer = AdamW(model.parameters(), release_gradients=scaler if is_named else True)
    if is_named:
        # The copy of the optimizer has the original scaler.
        model, optimizer, scaler = copy.deepcopy((model, optimizer, scaler))
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="another GradScaler" if is_named else "give release_gradients=scaler"):
        scaler.step(optimizer)


def test_a_disabled_scaler_changes_nothing():
    expected, _ = trained(AdamW)
    model = net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = AdamW(model.parameters(), release_gradients=scaler)
    for step in range(N_STEPS):
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert same(model.parameters(), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0"),
        ({"skip_nonfinite": True}, "skip_nonfinite=True"),
        ({"flatten": True}, "flatten=True"),
        ({"differentiable": True}, "differentiable=True"),
    ],
)
def test_what_needs_all_gradients_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Adam(net().parameters(), release_gradients=True, **options)


def test_parameters_without_a_shape_are_refused():
    with pytest.raises(ValueError, match="call the model once"):
        Adam(nn.LazyLinear(3).parameters(), release_gradients=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="release_gradients"):
        Adam(net().parameters(), release_gradients=value)


def test_sums_closures_and_second_backward_passes_are_refused():
    model = net()
    optimizer = Adam(model.parameters(), release_gradients=True)
    with pytest.raises(RuntimeError, match="sum_grad"):
        optimizer.sum_grad()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: loss_of(model, 0))
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss_of(model, 1).backward()


def test_averages_are_never_updated_as_parameters():
    model = net()
    _, optimizer = trained(lambda params: Adam(params, ema_decay=0.5, release_gradients=True), model)
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        loss_of(model, 0).backward()


def test_parameters_without_a_gradient_stay_and_late_groups_are_released():
    runs = []
    for release in (False, True):
        model = net()
        params = list(model.parameters())
        optimizer = AdamW(params[4:], release_gradients=release)
        model[6].weight.requires_grad_(False)
        for step in range(N_STEPS):
            if step == 2:
                optimizer.add_param_group({"params": params[:4], "lr": 0.1})
            loss_of(model, step).backward()
            if release and step > 2:
                assert params[0].grad is None
            optimizer.step()
            model.zero_grad()
        runs.append(params)
    assert same(*runs)


def test_a_copy_releases_and_a_gone_optimizer_does_not():
    model = net()
    _, optimizer = trained(lambda params: AdamW(params, release_gradients=True), model)
    twin_model, twin = copy.deepcopy((model, optimizer))
    loss_of(twin_model, 9).backward()
    assert twin_model[0].weight.grad is None
    twin.step()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    before = model[0].weight.detach().clone()
    loss_of(model, 9).backward()
    assert model[0].weight.grad is not None
    assert torch.equal(model[0].weight, before)


def test_a_scaler_is_borrowed_by_copies_and_refused_by_pickles():
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AdamW(net().parameters(), release_gradients=scaler)
    assert copy.deepcopy(optimizer)._settings.release_gradients is scaler
    with pytest.raises(TypeError, match="release_gradients"):
        torch.save(optimizer, io.BytesIO())


def test_parameters_that_leave_their_group_are_left_alone():
    model = net(2)
    optimizer = SGD(model.parameters(), lr=1.0, release_gradients=True)
    reference = copy.deepcopy(model)
    theirs = torch.optim.SGD(reference.parameters(), lr=1.0)
    for step in range(4):
        for trained_model, chosen in ((model, optimizer), (reference, theirs)):
            group = chosen.param_groups[0]
            if step == 1:
                group["params"] = [param for param in group["params"] if param is not trained_model[0].weight]
            if step == 2:
                chosen.add_param_group({"params": [trained_model[0].weight], "lr": 0.0})
                group["params"] = [param for param in group["params"] if param is not trained_model[2].bias]
                chosen.param_groups[1]["params"].append(trained_model[2].bias)
            if step == 3:
                del chosen.param_groups[1]
            loss_of(trained_model, step).backward()
            chosen.step()
            chosen.zero_grad()
        assert same(model.parameters(), reference.parameters()), step


def test_a_group_that_comes_between_two_backward_passes_hides_no_second_pass():
    model, other = net(1), torch.nn.Parameter(torch.ones(3))
    optimizer = SGD(model.parameters(), lr=1.0, release_gradients=True)
    loss_of(model, 0).backward()
    optimizer.add_param_group({"params": [other]})
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss_of(model, 1).backward()


def test_a_scaler_is_not_told_by_a_frozen_integer(monkeypatch):
    unused, trained = torch.nn.Linear(2, 2), torch.nn.Linear(8, 1)
    frozen = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(_release, "BUCKET_BYTES", 1)
    params = [*unused.parameters(), frozen, *trained.parameters()]
    optimizer = AdamW(params, release_gradients=scaler)
    scaler.scale(trained(torch.ones(4, 8)).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert frozen.grad is None
    assert all(param.grad is None for param in params)


def test_parameters_that_come_to_share_memory_are_named_in_any_bucket(monkeypatch):
    monkeypatch.setattr(_release, "BUCKET_BYTES", 4 * 8)
    params = {name: nn.Parameter(torch.ones(4)) for name in "abcd"}
    optimizer = SGD(params.items(), lr=0.1, release_gradients=True)
    params["c"].data = params["d"].data
    with pytest.raises(ValueError, match=r"parameter 2 \(c\) and parameter 3 \(d\)"):
        sum(param.sum() for param in params.values()).backward()
    assert optimizer.param_groups
