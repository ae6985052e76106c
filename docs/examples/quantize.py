"""Quantize a model to 2.5 bits per expert weight: python quantize.py MODEL calibration.jsonl held_out.txt OUTPUT."""

import sys

import planner

if len(sys.argv) != 5:
    sys.exit(__doc__)
model, text, held_out, output = sys.argv[1:]
made = planner.quantize(model, avg_bits=2.5, data=text, samples=16, seq_len=512, output=output, progress=print)
found = planner.evaluate(made.output, data=held_out, reference=model, max_tokens=8192, progress=print)
print(f"{made.achieved_avg_bits:g} bits, perplexity {found.perplexity:.3f}; serve it with: {made.serve}")
