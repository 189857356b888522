"""Stages of a recording as code that makes its calls."""
