"""Parameters and states of others, put into an optimizer for the time of a block, and steps that are traced."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dragon.vm.torch import optim as ours

from .both import MODULES

swapped_in = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)
needs_it = pytest.mark.skipif(swapped_in is None, reason="torch 2.15 brings swap_in_optimizer_params_and_state")

# With others a saved group lacks the keys of the group that it is put into, and PyTorch refuses it.
OWN_OPTIONS: list[dict[str, Any]] = [
    {"ema_decay": 0.9},
    {"max_grad_norm": 0.5},
    {"flatten": True},
    {"state_dtype": "8bit", "native_state_dict": True},
]


def run(make: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A model after one step."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = make(model.parameters())
    give_grads(model.parameters())
    optimizer.step()
    return model, optimizer


def give_grads(params: Any) -> None:
    for param in params:
        param.grad = torch.full_like(param, 0.5)


def assert_a_block_leaves_the_run_alone(make: Any) -> None:
    straight, optimizer = run(make)
    give_grads(straight.parameters())
    optimizer.step()
    model, optimizer = run(make)
    before = [param.detach().clone() for param in model.parameters()]
    others = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    state_dict = copy.deepcopy(optimizer.state_dict())
    give_grads(others.values())
    assert swapped_in is not None
    with swapped_in(optimizer, others, state_dict):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, others.values(), straight.parameters()))
    assert state_dict["state"][0]["step"] == 2
    give_grads(model.parameters())
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), straight.parameters()))


@needs_it
@pytest.mark.parametrize("module", MODULES)
def test_a_step_updates_what_is_swapped_in_and_leaves_the_run_alone(module: ModuleType) -> None:
    assert_a_block_leaves_the_run_alone(lambda params: module.AdamW(params, lr=0.1))


@needs_it
@pytest.mark.parametrize("options", OWN_OPTIONS, ids=str)
def test_the_same_with_options_of_this_library(options: dict[str, Any]) -> None:
    assert_a_block_leaves_the_run_alone(lambda params: ours.AdamW(params, lr=0.1, **options))


def test_a_step_cannot_be_traced_where_that_of_pytorchs_fused_can() -> None:
    """Ours reads step counts, which a graph would repeat."""

    def trace(module: ModuleType) -> None:
        param = nn.Parameter(torch.ones(3))
        optimizer = module.AdamW([param], lr=0.1, fused=True)
        param.grad = torch.ones(3)
        optimizer.step()

        def step(value: Tensor, grad: Tensor, count: Tensor) -> Tensor:
            traced = nn.Parameter(value)
            traced.grad = grad
            optimizer.param_groups[0]["params"] = [traced]
            optimizer.state[traced] = {**optimizer.state[param], "step": count}
            optimizer.step()
            return value

        make_fx(step)(torch.ones(3), torch.ones(3), torch.tensor(1.0))

    trace(torch.optim)
    with pytest.raises(RuntimeError, match="tracing tensor"):
        trace(ours)
