"""What the package costs and gains, measured side by side; each command says how it is run."""
