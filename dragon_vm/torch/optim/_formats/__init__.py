"""How a tensor is stored: plain, rounded, split from its master, or blockwise in 8 bits."""
