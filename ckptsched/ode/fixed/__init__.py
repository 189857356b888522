"""Solves over a fixed grid of times."""
