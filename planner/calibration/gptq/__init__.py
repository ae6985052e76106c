"""Quantize layer after layer with GPTQ, each on the output of the quantized layers before it."""
