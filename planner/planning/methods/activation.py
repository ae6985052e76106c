"""Often used experts first: by the tokens that choose them, or by the probability that these give them."""

from planner.planning.method import Method, descending

FREQUENCY = Method(observed=("tokens",), order=descending("tokens"))
WEIGHT = Method(observed=("gate_probability",), order=descending("gate_probability"))
