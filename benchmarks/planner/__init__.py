"""Plans and planning time, beside published planners."""
