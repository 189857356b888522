"""The memory explorer: plans as one page of HTML, and as files that other viewers read."""
