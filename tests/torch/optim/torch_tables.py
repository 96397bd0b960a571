"""Import PyTorch's tables of optimizer inputs without what importing its test helpers does to the process."""

import os
import sys
import types
import unittest

import torch

try:
    import expecttest  # noqa: F401  # its absence is what is asked for
except ImportError:
    # The helpers derive a class from it that no table uses.
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # type: ignore[assignment]  # stub

_environment = dict(os.environ)
_frozen = torch.backends.flags_frozen()

from torch.testing._internal.common_optimizers import (  # noqa: E402  # see above
    OptimizerErrorEnum,
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

# Importing them forbids to set flags such as torch.backends.cudnn.benchmark, and sets a compiler cache.
if not _frozen:
    torch.backends.__allow_nonbracketed_mutation_flag = True
for _name in set(os.environ) - set(_environment):
    del os.environ[_name]

all_inputs = _get_optim_inputs_including_global_cliquey_kwargs
INFOS = [info for info in optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)]

__all__ = ["INFOS", "OptimizerErrorEnum", "OptimizerInfo", "all_inputs", "optim_db"]
