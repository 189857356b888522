"""The right-hand side: the objects that it reads, keeps and draws, and its arguments."""
