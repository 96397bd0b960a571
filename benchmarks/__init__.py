"""Measurements and demonstrations that run on a user's own machine."""
