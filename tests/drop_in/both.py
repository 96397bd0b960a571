"""PyTorch's optimizers and ours, for tests that hold of both."""

from types import ModuleType
from typing import Any

import pytest
import torch

from dragon.vm.torch import optim as ours

MODULES = [pytest.param(torch.optim, id="torch"), pytest.param(ours, id="ours")]
NAMES = ["Adam", "AdamW", "SGD"]
BACKENDS = ["native", "eager", "triton"]

# PyTorch's, ours as a script builds them, and ours in each backend.
WAYS = [
    pytest.param((torch.optim, {}), id="torch"),
    pytest.param((ours, {}), id="ours"),
    *[pytest.param((ours, {"backend": backend}), id=backend) for backend in BACKENDS],
]


def build(way: tuple[ModuleType, dict[str, Any]], name: str, params: Any, **options: Any) -> Any:
    module, own = way
    return getattr(module, name)(params, **options, **own)
