"""Dragon's optimizers; the rest of `torch.optim` is PyTorch's own."""

from dragon.vm.torch._mirror import mirror

__getattr__, __dir__ = mirror("torch.optim", globals())
