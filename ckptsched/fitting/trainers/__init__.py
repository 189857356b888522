"""Callbacks by which trainers of other libraries fit what they train; each imports its library."""
