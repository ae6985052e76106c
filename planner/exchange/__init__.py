"""Convert checkpoints to other formats and back."""
