"""Exact bytes of stages, as runs show them."""
