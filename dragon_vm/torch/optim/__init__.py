"""Dragon's optimizers; the rest of `torch.optim` is PyTorch's own."""

import torch as _torch

from dragon.vm.torch._mirror import mirror
from dragon.vm.torch.optim import adam as _adam
from dragon.vm.torch.optim import adamw as _adamw
from dragon.vm.torch.optim import optimizer as _optimizer
from dragon.vm.torch.optim import sgd as _sgd
from dragon.vm.torch.optim._swap import swap
from dragon.vm.torch.optim.adam import Adam, AdamW
from dragon.vm.torch.optim.optimizer import Optimizer
from dragon.vm.torch.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "swap"]
__all__ += [name for name in _torch.optim.__all__ if name not in __all__]

__getattr__, __dir__ = mirror("torch.optim", globals())

# These stand in the places of PyTorch's modules. A type checker is not to take any name of theirs for good.
for _module in (_adam, _adamw, _optimizer, _sgd):
    _real_name = _module.__name__.removeprefix("dragon.vm.")
    vars(_module).update(zip(("__getattr__", "__dir__"), mirror(_real_name, vars(_module)), strict=True))
