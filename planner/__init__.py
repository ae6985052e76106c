"""The offline half: score experts, plan their widths, quantize and write the checkpoint."""
