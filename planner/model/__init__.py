"""A source model: where it lies, how its tensors are stored, which of them are experts."""
