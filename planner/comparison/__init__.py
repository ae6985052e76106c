"""Which allocation is best for a model: every method's widths, evaluated side by side."""
