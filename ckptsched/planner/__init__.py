"""From a chain and a budget to a plan: choice of solver, certificate, cache, comparison."""
