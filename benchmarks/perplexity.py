"""Held-out perplexity of uniform widths, the paper's rule and other methods, as a Markdown table.

python benchmarks/perplexity.py benchmarks/models/stdlib-mixtral
"""

from __future__ import annotations

import argparse
import tempfile
from fractions import Fraction
from pathlib import Path

import torch

from planner.calibration.collect import Wanted, collect
from planner.calibration.text import calibration_text
from planner.checkpoint import SourceModel
from planner.evaluation import perplexity, read_text
from planner.models import read_layout
from planner.options import PlanOptions
from planner.pipeline import quantize
from planner.planning import make_plan
from planner.progress import Progress
from planner.settings import QuantizeSettings, default_linear

TEXT = Path(__file__).parent / "models" / "calibration.jsonl"
QUIET = Progress(quiet=True)


def measure(model: Path, text: str, options: PlanOptions, quantizer: str, linear_bits: int) -> tuple[float, float, int]:
    """Return (achieved average bits, perplexity, bytes of the output's tensors)."""
    with SourceModel(model) as source, tempfile.TemporaryDirectory() as temporary:
        layout = read_layout(source)
        settings = QuantizeSettings(quantizer=quantizer, linear=default_linear(source, layout, linear_bits))
        plan = make_plan(source, layout, options, QUIET)
        output = Path(temporary) / "model"
        sizes = quantize(source, layout, plan, output, settings, QUIET)
        return plan.achieved_avg_bits, perplexity(output, text, QUIET), sizes.total_bytes


def calibrate(model: Path, output: Path) -> Path:
    """Write the statistics of training text, 128 × 512 tokens, with the errors of every width that is chosen from."""
    text = calibration_text(model, str(TEXT), 128, 512, 0)
    with SourceModel(model) as source:
        cpu = torch.device("cpu")
        wanted = Wanted(("error",), (1, 2, 3))
        collect(source, read_layout(source), text, output, {}, cpu, torch.float32, QUIET, wanted=wanted)
    return output


def cases(model: Path, stats: Path) -> list[tuple[str, PlanOptions]]:
    """Return the rows of the table."""
    rows: list[tuple[str, PlanOptions]] = []
    for bits in (1, 2, 3, 4):
        rows.append((f"uniform {bits}", PlanOptions(Fraction(bits), (bits,), method="uniform")))
    for choices in ((1, 2, 3), (2, 3)):
        label = ",".join(map(str, choices))
        for average in (Fraction(2), Fraction(5, 2)):
            changed = PlanOptions(average, choices, initial_model=model / "initial-router")
            rows.append((f"router norm + MaxVar, {label}", PlanOptions(average, choices)))
            rows.append((f"router norm change + MaxVar, {label}", changed))
            rows.append((f"MaxVar only, {label}", PlanOptions(average, choices, method="max-var")))
            for method, name in (("frequency", "frequency"), ("weight", "gate weight"), ("pmq", "PMQ")):
                rows.append((f"{name}, {label}", PlanOptions(average, choices, method=method, stats=stats)))
            rows.append((f"random, {label}", PlanOptions(average, choices, method="random")))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantizer", default="hqq")
    parser.add_argument("--linear-bits", type=int, default=4)
    args = parser.parse_args()
    text = read_text(args.model / "held_out.txt")
    print("| widths | average bits | MiB | held-out perplexity |\n|---|---|---|---|")
    weights = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    print(
        f"| original (bfloat16) | 16 | {weights / 2**20:.2f} | {perplexity(args.model, text, QUIET):.3f} |", flush=True
    )
    with tempfile.TemporaryDirectory() as temporary:
        stats = calibrate(args.model, Path(temporary) / "stats.safetensors")
        for name, options in cases(args.model, stats):
            average, value, size = measure(args.model, text, options, args.quantizer, args.linear_bits)
            print(f"| {name} | {average:.3f} | {size / 2**20:.2f} | {value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
