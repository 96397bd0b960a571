"""Across processes."""
