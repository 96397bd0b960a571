"""What is computed: one record an algorithm, and the average of parameters."""
