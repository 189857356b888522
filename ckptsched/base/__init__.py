"""Errors, budgets in bytes, files, progress and tables: nothing of models or of chains."""
