"""Dragon's optimizers; the rest of `torch.optim` is PyTorch's own."""

import torch as _torch

from dragon.vm.torch._mirror import mirror
from dragon.vm.torch.optim._swap import swap
from dragon.vm.torch.optim.adam import Adam, AdamW
from dragon.vm.torch.optim.optimizer import Optimizer
from dragon.vm.torch.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "swap"]
__all__ += [name for name in _torch.optim.__all__ if name not in __all__]

__getattr__, __dir__ = mirror("torch.optim", globals())
