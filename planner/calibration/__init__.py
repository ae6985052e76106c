"""Run a model over text, one layer of weights at a time: statistics, and quantization that uses them."""
