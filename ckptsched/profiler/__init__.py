"""From a model and a sample to a chain: bytes and seconds of each stage."""
