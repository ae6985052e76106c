"""Source models: their location, the storage of their tensors, and which tensors are experts."""
