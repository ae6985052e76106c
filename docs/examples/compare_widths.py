"""How quality falls with size: quantize a model at several averages and measure each against the original.

python compare_widths.py MODEL calibration.jsonl held_out.txt
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def moeq(*arguments: object) -> dict:
    """Run the command and return what it prints as JSON."""
    command = ["moeq", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Print a Markdown table."""
    model, data, held_out = sys.argv[1:4]
    print("| bits | MiB | perplexity | KL to the original, nats | same most likely token |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for bits in (2, 2.5, 3):
            output = Path(folder) / f"{bits}bit"
            made = moeq("quantize", model, "--avg-bits", bits, "--data", data, "--seq-len", 512, "-o", output)
            found = moeq("eval", output, "--data", held_out, "--reference", model, "--max-tokens", 16384)
            size, kl = made["sizes"]["total_bytes"] / 2**20, found["kl"]
            print(f"| {bits} | {size:.2f} | {found['perplexity']:.3f} | {kl['mean']:.4f} | {kl['same_top']:.1%} |")


if __name__ == "__main__":
    main()
