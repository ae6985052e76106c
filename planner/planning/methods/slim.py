"""Slim-LLM (Huang et al., ICML 2025): widths per group of weights in every expert (see ``quantizers/slim.py``)."""

from planner.planning.method import Method

METHOD = Method(only_compared="the format has one width per expert; moeq compare measures it on dequantized weights")
