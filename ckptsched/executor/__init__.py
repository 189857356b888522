"""Training steps that follow a plan, and their verification."""
