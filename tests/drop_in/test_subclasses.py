"""Classes that programs derive from an optimizer, and objects that they put around one."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dragon.vm.torch import optim as ours
from tests.drop_in.both import MODULES, NAMES

each_module = pytest.mark.parametrize("module", MODULES)
each_name = pytest.mark.parametrize("name", NAMES)


@each_module
@each_name
def test_a_base_class_behind_the_optimizer_is_initialised_and_restored(module: ModuleType, name: str) -> None:
    """As in OLMo, whose `AdamW` derives from PyTorch's and from an `Optimizer` of its own."""

    class Recording(torch.optim.Optimizer):
        def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
            super().__init__(params, defaults)
            self.calls = [sorted(group["lr"] for group in self.param_groups)]

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            self.calls.append(sorted(state))

    class Own(getattr(module, name), Recording):
        pass

    optimizer = Own([nn.Parameter(torch.ones(3))], lr=0.5)
    assert optimizer.calls == [[0.5]]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.calls == [[0.5], ["param_groups", "state"]]


class Wrapper(torch.optim.Optimizer):
    """As the optimizer of Lightning Lite 1.5, and as a class derived from PyTorch's does under a swap."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = optimizer.__dict__
        self.inner = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@each_module
@each_name
def test_a_wrapper_that_takes_over_all_attributes_saves_and_loads(module: ModuleType, name: str) -> None:
    def build(param: nn.Parameter) -> Any:
        return getattr(module, name)([param], lr=0.1, **{"momentum": 0.9} if name == "SGD" else {})

    def train(param: nn.Parameter, optimizer: Any) -> None:
        for value in (1.0, 2.0):
            param.grad = torch.full((3,), value)
            optimizer.step()

    param, twin, resumed = (nn.Parameter(torch.ones(3)) for _ in range(3))
    wrapper, plain = Wrapper(build(param)), build(twin)
    train(param, wrapper)
    saved, value = copy.deepcopy(wrapper.state_dict()), param.detach().clone()
    train(param, wrapper)
    with torch.no_grad():
        param.copy_(value)
        resumed.copy_(value)
    wrapper.load_state_dict(saved)
    reader = build(resumed)
    reader.load_state_dict(copy.deepcopy(saved))
    train(param, wrapper)
    train(resumed, reader)
    train(twin, plain)
    train(twin, plain)
    assert torch.equal(param, twin)
    assert torch.equal(resumed, twin)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"master_weights": "split16"}, {"state_dtype": torch.float32}], ids=str)
def test_such_a_wrapper_saves_and_loads_nothing_that_pytorch_would_change(
    name: str, options: dict[str, Any]
) -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = getattr(ours, name)([param], **options)
    wrapper = Wrapper(optimizer)
    param.grad = torch.ones_like(param)
    wrapper.step()
    before = dict(optimizer.state[param])
    refused = r"Wrapper, .* cannot save or load its states: call state_dict\(\)"
    with pytest.raises(RuntimeError, match=refused):
        wrapper.state_dict()
    with pytest.raises(RuntimeError, match=refused):
        wrapper.load_state_dict(optimizer.state_dict())
    assert all(value is before[key] for key, value in optimizer.state[param].items())


@pytest.mark.parametrize("name", NAMES[:2])
def test_saved_states_of_a_step_of_ones_own_are_loaded_by_a_class_derived_from_pytorchs_alone(name: str) -> None:
    def derived(base: Any) -> Any:
        class Own(base):
            def step(self, closure: Any = None) -> None:
                for param in self.param_groups[0]["params"]:
                    state = self.state[param]
                    state["step"] = state.get("step", 0) + 1
                    state["row"] = param.grad.mean()

        return Own

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = derived(getattr(ours, name))([param])
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="no exp_avg for parameter 0: it has step, row"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[param]["row"] == 1.0
    reader = derived(getattr(torch.optim, name))([param])
    reader.load_state_dict(saved)
    assert reader.state[param] == {"step": 1, "row": 1.0}


def test_a_subclass_may_keep_something_under_a_name_of_ours() -> None:
    class Clipping(ours.AdamW):
        def step(self, closure: Any = None, **options: Any) -> Any:
            self.grad_norm = nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
            self.n_skipped_steps = "none"
            return super().step(closure, **options)

    param = nn.Parameter(torch.ones(4))
    optimizer = Clipping([param], max_grad_norm=1.0, skip_nonfinite=True)
    assert (optimizer.grad_norm, optimizer.n_skipped_steps) == (None, 0)
    param.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.grad_norm == 2.0
    assert optimizer.n_skipped_steps == "none"
    # Copies have PyTorch's attributes and ours, as with PyTorch.
    assert copy.deepcopy(optimizer).n_skipped_steps == 0
