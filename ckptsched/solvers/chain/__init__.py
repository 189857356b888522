"""`chain_dp`: dynamic programming over a chain of any stages."""
