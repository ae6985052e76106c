"""From scores to a plan: which expert gets which width."""
