"""The quality of memory modes, and of models of what peers store, by plain PyTorch loops on the CPU."""
