"""Describe a checkpoint for people: the report (HTML and PNG), the model card, and the files to push to the Hub."""
