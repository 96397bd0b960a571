"""Classes that programs derive from an optimizer, and objects that they put around one."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

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
