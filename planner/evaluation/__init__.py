"""How good a quantized model is."""

from planner.evaluation.perplexity import perplexity, read_text

__all__ = ["perplexity", "read_text"]
