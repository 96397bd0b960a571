"""What torch.optim.Adam takes and does beside updating: hooks, names, closures, tensors, what autograd sees."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dragon.vm import torch as dragon
from dragon.vm.torch.optim import Adam, AdamW, Optimizer

from .judging import judged_step, make_params, params_of, same_bits, set_grads, snapshots


def test_the_classes_are_related_as_pytorchs_are() -> None:
    assert issubclass(AdamW, Adam)
    assert issubclass(Adam, Optimizer)
    assert issubclass(Optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("make", [Adam, AdamW, torch.optim.Adam])
def test_hooks_run_around_each_step_in_pytorchs_order(make: Any) -> None:
    optimizer = make(make_params())
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda which, *_: seen.append(name) if which is optimizer else None

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    set_grads(params_of(optimizer), 0)
    optimizer.step(lambda: seen.append("closure"))
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["global pre", "pre", "closure", "post", "global post"]


@pytest.mark.parametrize("make", [Adam, torch.optim.Adam])
@pytest.mark.parametrize("is_global", [False, True])
def test_a_hook_that_comes_during_a_step_runs_after_it(make: Any, is_global: bool) -> None:
    optimizer, seen = make(make_params()), []
    register = register_optimizer_step_post_hook if is_global else optimizer.register_step_post_hook
    handles: list[Any] = []

    def closure() -> None:
        handles.append(register(lambda which, args, kwargs: seen.append((which, args, kwargs))))

    optimizer.step(closure)
    handles[0].remove()
    optimizer.step()
    assert seen == [(optimizer, (optimizer, closure), {})]


def test_a_pre_hook_replaces_arguments_and_a_step_is_seen_by_the_profiler() -> None:
    optimizer = Adam(make_params())
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: 42), kwargs))
    with torch.profiler.profile(acc_events=True) as profile:
        assert optimizer.step(None) == 42
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"} <= names
    assert Adam.step.hooked is True


def test_a_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    params = make_params()
    optimizer = Adam(params)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(param.sum() for param in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_names_are_kept_and_saved() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1, bias=False))
    optimizer = Adam(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    assert params_of(optimizer) == list(model.parameters())
    with pytest.raises(ValueError, match="should be with/without names"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_two_models_with_the_same_names_are_told_apart_by_position() -> None:
    models = [torch.nn.Linear(2, 2, dtype=torch.bfloat16) for _ in range(2)]
    models[1].register_parameter("scale", torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)))
    groups: list[Any] = [{"params": model.named_parameters()} for model in models]
    optimizer = Adam(groups, master_weights=torch.float32)
    expected = ["0", "1", "2", "3", "scale"]
    assert list(optimizer.state_formats()) == [name for name, _ in optimizer.master_weights()] == expected


@pytest.mark.parametrize("lengths", [(3, 4), (2, 5), (4, 3), (1,)])
def test_a_name_that_is_a_number_is_never_taken_for_a_position(lengths: tuple[int, ...]) -> None:
    models = [torch.nn.ParameterList(map(torch.ones, [1] * length)) for length in lengths]
    optimizer = Adam([{"params": model.named_parameters()} for model in models])
    assert list(optimizer.state_formats()) == [str(position) for position in range(sum(lengths))]


def test_a_name_that_is_a_number_is_kept_as_long_as_all_parameters_have_names() -> None:
    first, second, third = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = Adam([{"params": [("5", first), ("3", second)]}, {"params": [("0", third)]}])
    assert list(optimizer.state_formats()) == ["5", "3", "0"]
    # The names of the first group are nobody's from here on.
    del optimizer.param_groups[0]["params"][0]
    assert list(optimizer.state_formats()) == ["0", "1"]


@pytest.mark.parametrize("make", [Adam, torch.optim.Adam])
@pytest.mark.parametrize("change", [list.clear, lambda params: params.append(torch.nn.Parameter(torch.ones(1)))])
def test_names_are_nobodys_once_the_list_of_parameters_has_changed(make: Any, change: Any) -> None:
    optimizer = make(torch.nn.Linear(2, 2).named_parameters())
    change(optimizer.param_groups[0]["params"])
    ours = Adam.from_torch(optimizer)
    set_grads(params_of(ours), 0)
    ours.step()
    ours.load_state_dict(ours.state_dict())
    assert list(ours.state_formats()) == [str(position) for position in range(len(params_of(ours)))]
    assert ours.memory()["parameters"] == sum(param.nbytes for param in params_of(ours))


@pytest.mark.parametrize("options", [{}, {"master_weights": torch.float32}, {"flatten": True}], ids=str)
def test_a_parameter_that_is_uninitialized_is_in_nobodys_way(options: dict[str, Any]) -> None:
    layer, param = torch.nn.LazyLinear(3, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = Adam([param, *layer.parameters()], **options)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.sum_grad()
        optimizer.step()
    assert list(optimizer.state_formats()) == ["0"]
    assert [name for name, _ in optimizer.master_weights()] == ["0"] * ("master_weights" in options)
    optimizer.load_state_dict(optimizer.state_dict())
    layer(torch.ones(2, 5).bfloat16()).sum().backward()
    optimizer.step()
    assert [float(optimizer.state[each]["step"]) for each in params_of(optimizer)] == [2.0, 1.0, 1.0]


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)])
@pytest.mark.parametrize("backend", [None, "eager", "triton"])
def test_tensors_as_hyperparameters_are_read_at_each_step(
    lr: torch.Tensor, backend: str | None, interpreted: None
) -> None:
    lr = lr.clone()
    betas = (torch.tensor(0.9), torch.tensor([[0.99]]))
    optimizer = Adam(make_params(), lr, betas, epsilon_hat=False, backend=backend)
    for number, value in enumerate((0.1, 0.5)):
        lr.fill_(value)
        betas[0].fill_(value)
        set_grads(params_of(optimizer), number)
        judged_step(optimizer)


def test_complex_parameters_are_updated_as_pairs_of_real_ones() -> None:
    params = make_params(torch.complex64)
    real = [torch.nn.Parameter(torch.view_as_real(param.detach()).clone()) for param in params]
    optimizers = [Adam(params, 0.1, amsgrad=True), Adam(real, 0.1, amsgrad=True)]
    for number in range(2):
        set_grads(params, number)
        for param, twin in zip(params, real, strict=True):
            twin.grad = torch.view_as_real(param.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert same_bits(snapshots(optimizers[0]), snapshots(optimizers[1]))


@pytest.fixture
def counters_in_float64() -> Iterator[None]:
    """PyTorch counts steps in the default dtype, and rounds its bias corrections to that."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("counters_in_float64")
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_autograd_sees_through_a_differentiable_step(make: type[Adam]) -> None:
    """The gradient with respect to the start, the gradient and the rate, as of PyTorch's."""
    found = []
    theirs = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}[make]
    for build in (lambda p, **kw: make(p, epsilon_hat=False, **kw), theirs):
        start = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
        grad = torch.linspace(1, 2, 6, dtype=torch.float64).requires_grad_()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        param = start.clone()
        optimizer = build([param], lr=lr, weight_decay=0.1, differentiable=True)
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        param.square().sum().backward()
        found.append((start.grad, grad.grad, lr.grad))
    for mine, their in zip(*found, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, their, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("set_to_none", [None, False, True])
@pytest.mark.parametrize("is_dragon", [False, True])
def test_zero_grad_does_what_the_parameters_ask_for_unless_told_otherwise(
    is_dragon: bool, set_to_none: bool | None
) -> None:
    params: list[Any] = make_params()
    if is_dragon:
        params = [dragon.nn.Parameter(param.detach()) for param in params]
    optimizer = Adam(params)
    set_grads(params_of(optimizer), 0)
    grads = [param.grad for param in params_of(optimizer)]
    optimizer.zero_grad(*(() if set_to_none is None else (set_to_none,)))
    removed = not is_dragon if set_to_none is None else set_to_none
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        assert (param.grad is None) == removed
        assert removed or not param.grad.any()
        assert not removed or grad.any()
