"""Models profiled on tensors without data: shapes alone tell what a step takes."""
