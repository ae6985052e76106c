"""Measure a model's quality: perplexity, KL divergence to a reference, accuracy on tasks."""

from planner.evaluation.perplexity import perplexity

__all__ = ["perplexity"]
