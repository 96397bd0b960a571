"""What is computed: one record an algorithm."""
