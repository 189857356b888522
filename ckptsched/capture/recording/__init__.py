"""Any module as a straight line of calls, recorded in one forward pass and made again."""
