"""Experiments of the ANODE paper (arXiv 1902.10298), a script each; see docs/measured/anode.md."""
