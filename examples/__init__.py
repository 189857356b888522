"""Short programs that a user would start from; run them from the root of the repository."""
