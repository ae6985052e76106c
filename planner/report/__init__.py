"""What a checkpoint tells people: the report (HTML, PNG), the model card, and the way to the Hub."""
