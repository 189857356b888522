"""The experiments of the ANODE paper (arXiv 1902.10298), each a script; see docs/anode.md."""
