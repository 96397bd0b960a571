"""What happens to gradients before the update: scaling, norms, zeroing."""
