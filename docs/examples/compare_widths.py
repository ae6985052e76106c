"""How quality falls with size: python compare_widths.py MODEL calibration.jsonl held_out.txt OUTPUT."""

import sys

import planner

if len(sys.argv) != 5:
    sys.exit(__doc__)
model, text, held_out, output = sys.argv[1:]
found = planner.compare(
    model, methods="kl", avg_bits=(2, 2.5, 3), data=text, samples=16, held_out=held_out, max_tokens=8192,
    quantizer="gptq", output=output, progress=print,
)  # fmt: skip
print("| bits | MiB | perplexity | KL to the original, nats | same most likely token |\n|---|---|---|---|---|")
for row in found.rows:
    size, same = f"{row['bytes'] / 2**20:.2f}", f"{row['same_top']:.1%}"
    print(f"| {row['achieved']:g} | {size} | {row['perplexity']:.3f} | {row['kl']:.4f} | {same} |")
