"""From flattened groups to a step that is prepared once: guards, hyperparameters, step and cache."""
