"""What plans of graphs give, and which schedules the two classes of solvers miss."""
