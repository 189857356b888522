"""State around a call of the model: settings, modes, hooks, autocast, random state, locks."""
