"""Keyword arguments in groups, named as the flags: their types, defaults and bounds, and what they stand for."""
