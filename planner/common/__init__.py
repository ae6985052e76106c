"""Code that all other folders use: progress, memory, units."""
