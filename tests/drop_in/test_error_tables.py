"""PyTorch's own table of erroneous inputs: the same outcome for PyTorch's optimizers and ours.

An outcome is the error's type and text, or the warnings and the optimizer that is built: a warning ends nothing.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dragon.vm.torch import optim as ours

from ..torch.optim.torch_tables import OptimizerErrorEnum, optim_db

INFOS = [info for info in optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)]
CASES = [
    pytest.param(info, device, number, id=f"{info.optim_cls.__name__}-{device}-{case.optimizer_error_input.desc}")
    for info in INFOS
    for device in ("cpu", "cuda")
    if device == "cpu" or torch.cuda.is_available()
    for number, case in enumerate(info.optim_error_inputs_func(device=device, dtype=torch.float32))
]

# Where ours raises instead of a warning, as the documentation says: the start of the warning's text.
REFUSED = "optimizer contains a parameter group with duplicate parameters"


def outcome(run: Callable[[], Any]) -> tuple[Any, ...]:
    """("error", type, text), or ("warnings", (category, text) of each) of a call that ends well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except Exception as error:
            return "error", type(error), str(error)
    return "warnings", *[(warning.category, str(warning.message)) for warning in caught]


def given(info: Any, device: str, number: int) -> tuple[Any, Any]:
    """The case with parameters of its own."""
    case = info.optim_error_inputs_func(device=device, dtype=torch.float32)[number]
    inputs = case.optimizer_error_input
    if inputs.params is None:
        generator = torch.Generator().manual_seed(0)
        inputs.params = [nn.Parameter(torch.randn(2, 3, generator=generator).to(device)) for _ in range(2)]
    return case, inputs


@pytest.mark.parametrize(("info", "device", "number"), CASES)
def test_an_erroneous_input_has_pytorchs_outcome(info: Any, device: str, number: int) -> None:
    found = []
    for make in (info.optim_cls, getattr(ours, info.optim_cls.__name__)):
        case, inputs = given(info, device, number)

        def run(make: Any = make, case: Any = case, inputs: Any = inputs) -> None:
            optimizer = make(inputs.params, **inputs.kwargs)
            if case.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()

        found.append(outcome(run))
    theirs, mine = found
    if theirs[0] == "warnings" and theirs[1][1].startswith(REFUSED):
        # Ours refuses, and says that PyTorch warns.
        assert mine[:2] == ("error", ValueError)
        assert "PyTorch" in mine[2]
    else:
        assert mine == theirs


def test_the_table_still_has_cases() -> None:
    assert len(INFOS) == 3
    assert len(CASES) >= 20


OPTIONS: list[dict[str, Any]] = [
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": torch.tensor(0.1), "foreach": True, "capturable": True},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": -1.0},
    {"lr": float("nan")},
    {"weight_decay": -1.0},
    {"eps": -1.0},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9,)},
    {"betas": (torch.tensor(0.9), 0.99)},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))},
    {"momentum": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
    {"foreach": True, "differentiable": True},
    {"decoupled_weight_decay": True},
    {"lr": torch.tensor(0.1)},
    {"lr": 1},
    {"params": torch.ones(2)},
    {"params": []},
    {"params": [{"lr": 0.1}]},
    {"params": [torch.ones(2, requires_grad=True) * 2]},
    {"params": ["text"]},
    {"params": {torch.nn.Parameter(torch.ones(1))}},
    {"params": [{"params": {torch.nn.Parameter(torch.ones(1))}}]},
]


def known(name: str, options: dict[str, Any]) -> bool:
    return set(options) <= set(inspect.signature(getattr(torch.optim, name)).parameters)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{options}")
        for name in ("Adam", "AdamW", "SGD")
        for options in OPTIONS
        if known(name, options)
    ],
)
def test_options_have_pytorchs_outcome(name: str, options: dict[str, Any]) -> None:
    found = []
    for module in (torch.optim, ours):
        params = options.get("params", [nn.Parameter(torch.ones(2))])
        rest = {key: value for key, value in options.items() if key != "params"}
        found.append(outcome(partial(getattr(module, name), params, **rest)))
    if (name, str(options)) == ("SGD", "{'lr': nan}"):
        # PyTorch's trains to NaN in silence.
        assert found == [("warnings",), ("error", ValueError, "Invalid learning rate: nan")]
    else:
        assert found[1] == found[0]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_an_unknown_option_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}\.__init__\(\) got .*unexpected keyword argument.*'nonsense'"):
        getattr(ours, name)([nn.Parameter(torch.ones(2))], nonsense=1)
