"""PyTorch's own tables of optimizer inputs, of errors and of schedulers, given to ours."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam, AdamW

from .judging import judged_step, make_params, place, set_grads
from .torch_tables import INFOS, OptimizerErrorEnum, OptimizerInfo, all_inputs

OURS = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def inputs(info: OptimizerInfo, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Keyword arguments of the table: those for the CPU, and those for CUDA, which here work everywhere."""
    cases = [*all_inputs("cpu", dtype, info), *info.optim_inputs_func(device="cuda", dtype=dtype)]
    return [case.kwargs for case in cases]


INPUTS = [
    pytest.param(info, dtype, number, id=f"{info.name}-{dtype}-{number}".replace("torch.", ""))
    for info in INFOS
    for dtype in DTYPES
    for number in range(len(inputs(info, dtype)))
]
ERRORS = [
    pytest.param(info, device, number, id=f"{info.name}-{device}-{case.optimizer_error_input.desc}")
    for info in INFOS
    for device in ("cpu", "cuda")
    if device == "cpu" or torch.cuda.is_available()
    for number, case in enumerate(info.optim_error_inputs_func(device=device, dtype=torch.float32))
]


@pytest.mark.parametrize(("info", "dtype", "number"), INPUTS)
def test_every_input_of_the_table_is_updated_as_pytorch_would(
    info: OptimizerInfo, dtype: torch.dtype, number: int
) -> None:
    arguments = inputs(info, dtype)[number]
    params: list[Any] = make_params(dtype)
    if arguments.get("differentiable"):
        # Autograd forbids to update a leaf that requires a gradient where it can see it, in PyTorch's as in ours.
        params = [param.detach() for param in params]
    optimizer = OURS[info.optim_cls](params, epsilon_hat=False, **arguments)
    for step in range(2):
        set_grads(params, step)
        judged_step(optimizer)


# Without flags such as `foreach`, which change no launch.
@pytest.mark.parametrize(
    ("info", "dtype"),
    list(zip(INFOS, (torch.float32, torch.bfloat16), strict=True)),
    ids=["Adam-float32", "AdamW-bfloat16"],
)
def test_the_kernel_updates_the_inputs_of_the_table_as_pytorch_would(
    info: OptimizerInfo, dtype: torch.dtype, device: torch.device
) -> None:
    for case in info.optim_inputs_func(device="cuda", dtype=dtype):
        params = make_params(dtype, place("triton", device))
        optimizer = OURS[info.optim_cls](params, epsilon_hat=False, backend="triton", **case.kwargs)
        for step in range(2):
            set_grads(params, step)
            judged_step(optimizer)


def outcome(build: Callable[[], Any]) -> tuple[type, str] | None:
    """Type and text of what a call raises or warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(("info", "device", "number"), ERRORS)
def test_every_erroneous_input_of_the_table_has_pytorchs_error(
    info: OptimizerInfo, device: str, number: int
) -> None:
    found = []
    for make in (info.optim_cls, OURS[info.optim_cls]):
        case = info.optim_error_inputs_func(device=device, dtype=torch.float32)[number]
        given = case.optimizer_error_input
        params = make_params(device=device) if given.params is None else given.params
        assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        found.append(outcome(lambda make=make, params=params, given=given: make(params, **given.kwargs)))
    assert found[0] is not None
    assert found[1] == found[0]


@pytest.mark.parametrize(
    ("arguments", "foreign"),
    [
        ({"fused": True, "differentiable": True}, RuntimeError),
        ({"fused": True, "foreach": True}, RuntimeError),
        ({"lr": -1.0}, ValueError),
        ({"eps": -1.0}, ValueError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"betas": (0.9, -0.1)}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))}, (ValueError, RuntimeError)),
        ({"betas": (torch.tensor(0.9), torch.tensor([0.9, 0.9]))}, (ValueError, RuntimeError)),
        ({"nonsense": 1}, TypeError),
    ],
)
def test_errors_that_the_table_lacks_have_pytorchs_text_too(
    arguments: dict[str, Any], foreign: type[Exception]
) -> None:
    theirs = outcome(lambda: torch.optim.Adam(make_params(), **arguments))
    ours = outcome(lambda: Adam(make_params(), **arguments))
    assert theirs is not None
    assert issubclass(theirs[0], foreign)
    if "nonsense" in arguments:
        assert ours is not None
        assert ours[0] is theirs[0]
        assert "'nonsense'" in ours[1]
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("info", "number"),
    [pytest.param(info, n, id=f"{info.name}-{n}") for info in INFOS for n in range(len(info.scheduler_inputs))],
)
def test_every_scheduler_of_the_table_drives_ours_as_it_drives_pytorchs(info: OptimizerInfo, number: int) -> None:
    rates = []
    for make in (info.optim_cls, OURS[info.optim_cls]):
        params = make_params()
        optimizer = make(params, lr=0.1)
        schedulers = [make_scheduler(optimizer) for make_scheduler in info.scheduler_inputs[number]]
        rates.append([])
        for step in range(12):
            set_grads(params, step)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(
                    *([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
                )
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_ours_takes_every_argument_of_pytorchs_with_its_default(info: OptimizerInfo) -> None:
    theirs = dict(inspect.signature(info.optim_cls).parameters)
    defaults = OURS[info.optim_cls](make_params()).defaults
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(inspect.signature(OURS[info.optim_cls]).parameters)[: len(positional)] == positional
    assert {name: defaults[name] for name in theirs if name != "params"} == {
        name: p.default for name, p in theirs.items() if name != "params"
    }
