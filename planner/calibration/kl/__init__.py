"""Measure and estimate the KL divergence that rounding an expert adds."""
