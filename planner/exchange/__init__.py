"""Checkpoints in other formats, and back."""
