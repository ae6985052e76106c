"""Quantize layer after layer with GPTQ, each on what the quantized layers before it produce."""
