"""Inspects a model: its modules, stages, signature, and the state that running it changes."""
