"""Integrators: tableaus, explicit and implicit steps, error estimates."""
