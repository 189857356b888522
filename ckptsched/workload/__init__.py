"""What is planned: stages with their figures, chains and graphs of them."""
