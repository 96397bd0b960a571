"""CUDA graphs: what can be captured, and hyperparameters that replays see change."""
