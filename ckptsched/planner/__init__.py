"""From a chain and a budget to a plan: choice of solver, certificate, cache, comparison."""

TIME_LIMIT = 60.0
"""Seconds of an integer program, where nothing else is said."""
