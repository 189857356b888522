"""Steps of real networks under plans, beside what else recomputes."""
