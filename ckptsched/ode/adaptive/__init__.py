"""Solves with error control, and their backward."""
