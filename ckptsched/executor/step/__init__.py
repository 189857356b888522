"""One training step by a plan: the outer graph, and what it runs."""
