"""What users say about recomputation: kept values, calls never or always made again."""
