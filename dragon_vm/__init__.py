"""Dragon's virtual machine for PyTorch programs: `dragon.vm.torch` mirrors `torch`."""
