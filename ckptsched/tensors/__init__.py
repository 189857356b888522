"""Tensors taken apart: pytrees, wrappers, devices."""
