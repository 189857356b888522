"""The calls that take a model and a budget: `plan`, `fit`, what is the largest that fits."""
