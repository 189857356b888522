"""What looks on during one forward pass, and notes its calls."""
