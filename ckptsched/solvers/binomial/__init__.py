"""Closed forms for equal stages: revolve and its relatives."""
