"""How a tensor is stored."""
