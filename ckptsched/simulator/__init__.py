"""The rules of schedules, and the bytes and seconds that a schedule takes on a workload."""
