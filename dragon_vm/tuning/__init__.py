"""Kernel tuning: launch configurations are measured on scratch memory and kept as data. See docs/tuning.md.

``dragon-vm tune`` (`dragon.vm.tune`) measures; `dragon.vm.torch.optim._backends.configs` looks results up.
"""
