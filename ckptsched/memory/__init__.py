"""Meters of live tensor bytes."""
