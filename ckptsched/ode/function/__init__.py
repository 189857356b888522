"""The right-hand side: what it reads, keeps and draws."""
