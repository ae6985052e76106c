"""Texts from files and datasets, and their tokens: one reader for every flag that takes a text."""
