"""Make a plan from scores: which expert gets which width."""
