"""The schedule language: five operations, and what simulating them shows."""
