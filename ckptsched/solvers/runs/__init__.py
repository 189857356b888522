"""`run_dp`: dynamic programming over chains of long runs of equal stages."""
