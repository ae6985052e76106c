"""Measure a model's quality: perplexity, KL divergence to a reference, accuracy on tasks."""

from planner.evaluation.perplexity import perplexity, read_text

__all__ = ["perplexity", "read_text"]
