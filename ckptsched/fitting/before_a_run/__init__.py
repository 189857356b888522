"""Answers before a machine is at hand: whether a training will fit a device, and what it costs."""
