"""From the optimizer to flattened groups: members, layouts, checks, backends, states and buffers."""
