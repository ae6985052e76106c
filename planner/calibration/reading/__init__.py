"""Run a model over a text, one layer at a time."""
