"""What a model is: its stages, its signature, its modules and their state."""
