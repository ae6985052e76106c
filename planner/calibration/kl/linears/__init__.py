"""Measure and estimate the KL divergence that rounding linears outside the experts adds."""
