"""Across processes: local shards, placements and sums over process groups. It imports torch alone."""
