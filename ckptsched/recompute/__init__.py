"""Running a stage again so that nothing but time differs: swaps, tapes, side outputs."""
