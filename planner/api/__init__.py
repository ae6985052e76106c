"""The planner for Python programs: a function per command, its keyword arguments, and what it returns."""
