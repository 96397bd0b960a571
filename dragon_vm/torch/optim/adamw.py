"""`AdamW` in the module where PyTorch has it."""

from dragon.vm.torch.optim.adam import AdamW

__all__ = ["AdamW"]
