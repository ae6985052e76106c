"""Compare allocation methods on a model: evaluate every method's widths side by side."""
