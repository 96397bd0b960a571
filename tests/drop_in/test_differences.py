"""What ours does otherwise than PyTorch's on purpose; docs/compatibility.md names these tests."""

import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dragon.vm.torch import optim as ours


def test_sgd_refuses_the_sparse_gradients_that_pytorchs_takes() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SGD does not support sparse gradients"):
        ours.SGD(embedding.parameters(), lr=0.1).step()
    assert torch.equal(embedding.weight, before)
    torch.optim.SGD(embedding.parameters(), lr=0.1).step()
    assert not torch.equal(embedding.weight, before)


def test_the_memory_of_flat_states_is_freed_by_the_next_step() -> None:
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    optimizer = ours.Adam(params, flatten=True)
    flats = []
    for _ in range(2):
        # Two plans.
        for chosen in (params, params[:2]):
            optimizer.zero_grad()
            sum(param.sum() for param in chosen).backward()
            optimizer.step()
        flats.append(weakref.ref(optimizer._updater.buffers[0].state["exp_avg"]))
        assert flats[-1]() is not None
        optimizer.state.clear()
        assert flats[-1]() is not None
    assert flats[0]() is None


def test_a_state_that_is_taken_out_moves_those_of_its_buffer() -> None:
    params = [nn.Parameter(torch.ones(100)) for _ in range(3)]
    optimizer = ours.Adam(params, flatten=True)
    for _ in range(2):
        sum(param.sum() for param in params).backward()
        optimizer.step()
        kept = {param: state["exp_avg"] for param, state in optimizer.state.items()}
    del optimizer.state[params[0]]
    optimizer.step()
    assert all(optimizer.state[param]["exp_avg"] is not kept[param] for param in params)


def test_a_compiled_function_cannot_read_groups_that_a_graph_follows() -> None:
    optimizer = ours.Adam([nn.Parameter(torch.ones(3))], capturable=True)

    @torch.compile(backend="eager")
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * optimizer.param_groups[0]["lr"]

    try:
        found = scaled(torch.ones(2))
    except torch._dynamo.exc.InternalTorchDynamoError:
        return
    # Dynamo of torch 2.11 can, and that of 2.15 again.
    assert not (2, 12) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
    assert torch.equal(found, torch.full((2,), 1e-3))


@pytest.mark.parametrize("capturable", [False, True])
def test_groups_that_a_graph_follows_are_copies_of_the_constructors_dicts(capturable: bool) -> None:
    rates = []
    for module in (torch.optim, ours):
        group = {"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}
        optimizer = module.Adam([group], capturable=capturable)
        group["lr"] = 0.5
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.1 if capturable else 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sgd_of_half_precision_is_right_where_pytorchs_is_wrong(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, 64, generator=generator)
    found = []
    for make, kind in ((torch.optim.SGD, torch.float32), (torch.optim.SGD, dtype), (ours.SGD, dtype)):
        param = nn.Parameter(start.to(kind, copy=True))
        optimizer = make([param], lr=0.1, momentum=0.9, fused=True)
        for grad in grads:
            param.grad = grad.to(kind)
            optimizer.step()
        found.append(param.detach().float())
    expected, theirs, mine = found
    # PyTorch's is right from 2.14 on.
    is_mended = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    assert is_mended or (theirs - expected).abs().max() > 0.1
    torch.testing.assert_close(mine, expected, rtol=0, atol=0.02)


def test_a_model_whose_dtype_changes_goes_on_with_its_states() -> None:
    for module, is_refused in ((torch.optim, True), (ours, False)):
        model = nn.Linear(3, 2)
        optimizer = module.Adam(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.double()
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        if is_refused:
            with pytest.raises(RuntimeError, match="expected dtype"):
                optimizer.step()
            continue
        optimizer.step()
        state = optimizer.state[model.weight]
        assert (model.weight.dtype, state["exp_avg"].dtype) == (torch.float64, torch.float64)
        model.bfloat16()
        model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        state = optimizer.state[model.weight]
        assert (model.weight.dtype, state["exp_avg"].dtype) == (torch.bfloat16, torch.float64)
        assert state["step"] == 3


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}], ids=str)
def test_states_that_a_program_makes_in_bf16_are_widened_unless_that_is_asked_for(options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(64))
    optimizer = ours.AdamW([param], fused=True, **options)
    optimizer.state[param] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(64, dtype=torch.bfloat16),
        "exp_avg_sq": torch.zeros(64, dtype=torch.bfloat16),
    }
    param.grad = torch.ones(64)
    optimizer.step()
    expected = options.get("state_dtype", torch.float32)
    assert {optimizer.state[param][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {expected}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_first_moments_are_bounded_where_the_second_ones_were_saved_in_fp16(param_dtype: Any, dtype: Any) -> None:
    """As Ultralytics saved them: squares of small gradients are 0 in fp16, and an update divides by epsilon."""
    largest = []
    for module in (torch.optim, ours):
        param = nn.Parameter(torch.zeros(64, dtype=param_dtype))
        optimizer = module.AdamW([param], lr=1e-3)
        for _ in range(5):
            param.grad = torch.linspace(1e-5, 1, 64).to(param_dtype) ** 3
            optimizer.step()
        saved = optimizer.state_dict()
        for name in ("exp_avg", "exp_avg_sq"):
            saved["state"][0][name] = saved["state"][0][name].to(dtype)
        optimizer.load_state_dict(saved)
        before, param.grad = param.detach().clone(), torch.zeros_like(param)
        optimizer.step()
        largest.append(float((param.detach() - before).abs().max()))
    assert largest[0] > 0.1
    assert largest[1] < 7.28e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_first_moments_that_fit_their_second_ones_are_loaded_as_they_are(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(64))
    optimizer = ours.Adam([param], lr=1e-3)
    for _ in range(5):
        param.grad = torch.linspace(-1, 1, 64)
        optimizer.step()
    saved = optimizer.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = saved["state"][0][name].to(dtype)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[param]["exp_avg"], saved["state"][0]["exp_avg"].float())


def test_an_entry_of_a_saved_state_is_no_entry_of_the_optimizer() -> None:
    """As of programs that convert or move what they are about to save."""
    for module in (torch.optim, ours):
        param = nn.Parameter(torch.ones(3))
        optimizer = module.Adam([param])
        param.grad = torch.ones(3)
        optimizer.step()
        saved = optimizer.state_dict()["state"][0]
        saved["exp_avg_sq"].fill_(4)
        saved["exp_avg"] = torch.zeros(3)
        assert (optimizer.state[param]["exp_avg_sq"] == 4).all()
        assert (optimizer.state[param]["exp_avg"] is saved["exp_avg"]) == (module is torch.optim)


def subclasses(cls: type) -> set[type]:
    return {found for kind in cls.__subclasses__() for found in (kind, *subclasses(kind))}


def test_who_lists_optimizers_by_name_finds_two_of_a_name_but_under_a_swap() -> None:
    both = {torch.optim.SGD, ours.SGD}
    assert both <= subclasses(torch.optim.Optimizer)
    with ours.swap():
        assert both & subclasses(torch.optim.Optimizer) == {torch.optim.SGD}


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_look_up_by_exact_type_does_not_find_ours(is_swapped: bool) -> None:
    supported = {torch.optim.Adam: "Adam"}
    with ours.swap() if is_swapped else nullcontext():
        optimizer = (torch.optim.Adam if is_swapped else ours.Adam)([nn.Parameter(torch.ones(3))])
    assert type(optimizer) not in supported
    assert isinstance(optimizer, tuple(supported))
    supported[ours.Adam] = "Adam"
    assert type(optimizer) in supported


def test_a_look_up_of_our_class_finds_nothing_but_that_of_a_swapped_class_does() -> None:
    defaults = {torch.optim.Adam: {"eps": 1e-5}}
    assert ours.Adam not in defaults
    with ours.swap():
        optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))], **defaults[torch.optim.Adam])
    assert type(optimizer) is ours.Adam
    assert optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("is_profiled", [False, True])
@pytest.mark.parametrize("is_ours", [False, True])
def test_ranges_are_made_for_a_profiler_only(is_ours: bool, is_profiled: bool, tmp_path: Path) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = (ours.Adam if is_ours else torch.optim.Adam)([param], lr=0.1)
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    with torch.profiler.profile(acc_events=True) if is_profiled else nullcontext():
        observer.start()
        param.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
        observer.stop()
    observer.unregister_callback()
    names = {node["name"] for node in json.loads((tmp_path / "trace.json").read_text())["nodes"]}
    ranges = {"Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"}
    assert names & ranges == (ranges if is_profiled or not is_ours else set())


def after_three_steps(kind: Any, start: torch.Tensor) -> torch.Tensor:
    """The sum of cubes of a parameter after steps on a quadratic loss, float64."""
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    param = start * 1
    optimizer = kind([torch.zeros(4, requires_grad=True)], lr=0.01, momentum=0.9, differentiable=True)
    optimizer.param_groups[0]["params"] = [param]
    for _ in range(3):
        (param.grad,) = torch.autograd.grad((matrix @ param).square().sum(), param, create_graph=True)
        optimizer.step()
    return param.pow(3).sum()


def test_a_differentiable_momentum_has_the_derivatives_of_its_formula() -> None:
    start, small = torch.linspace(0.1, 1, 4, dtype=torch.float64), 1e-6
    for kind, is_right in ((ours.SGD, True), (torch.optim.SGD, False)):
        at = start.clone().requires_grad_()
        (found,) = torch.autograd.grad(after_three_steps(kind, at), at)
        moved = [(at + small * unit, at - small * unit) for unit in torch.eye(4, dtype=torch.float64)]
        values = [[after_three_steps(kind, each).detach() for each in pair] for pair in moved]
        expected = torch.stack([(up - down) / (2 * small) for up, down in values])
        assert torch.allclose(found, expected, rtol=1e-6) == is_right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_half_precision_parameters_are_rounded_once_as_by_fused(backend: str, dtype: torch.dtype) -> None:
    def after(kind: Any, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.randn(1000, generator=generator).to(dtype))
        optimizer = kind([param], lr=0.01, **options)
        for _ in range(3):
            param.grad = torch.randn(1000, generator=generator).to(dtype)
            param.grad[:10] = 0
            optimizer.step()
        return param.detach()

    found, default = after(ours.AdamW, backend=backend), after(torch.optim.AdamW)
    assert float((found != after(torch.optim.AdamW, fused=True)).float().mean()) < 0.02
    assert 0.05 < float((found != default).float().mean()) < 0.9
    assert found.isfinite().all()
    assert default[:10].isnan().all() == (dtype == torch.float16)
