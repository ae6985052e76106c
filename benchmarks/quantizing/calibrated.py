"""This benchmark shows the gain of calibration: errors of MoE outputs and perplexity with rtn, hqq and gptq.

python benchmarks/quantizing/calibrated.py benchmarks/models/stdlib-mixtral
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.routed import Routed, finish, first_hidden, route
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.evaluation import perplexity
from planner.exchange.dense import export_dense
from planner.model.layout import read_layout
from planner.model.source import SourceModel

QUIET = Progress(quiet=True)
TEXT = Path(__file__).parents[1] / "models" / "calibration.jsonl"
CASES = {
    "uniform 2": ("--method", "uniform", "--avg-bits", "2", "--bits", "2"),
    "uniform 3": ("--method", "uniform", "--avg-bits", "3", "--bits", "3"),
    "1,2,3 @ 2.5": ("--method", "router-norm-maxvar", "--avg-bits", "2.5", "--bits", "1,2,3"),
    "2,3 @ 2.5": ("--method", "router-norm-maxvar", "--avg-bits", "2.5", "--bits", "2,3"),
    "1,2,3 @ 2.0": ("--method", "router-norm-maxvar", "--avg-bits", "2.0", "--bits", "1,2,3"),
}


def outputs(decoder: Decoder, weights: SourceModel, index: int, routed: Routed) -> torch.Tensor:
    """Return the sum of a layer's experts [tokens, hidden] with the weights of some checkpoint."""
    layer = decoder.moe[index]
    routed.outputs.zero_()
    for expert in range(layer.num_experts):
        matrices = load_expert(weights, layer, expert, decoder.device, decoder.dtype)
        for inputs, share, places in routed.chunks(expert, decoder.device):
            routed.add(places, matrices(inputs, decoder.activation) * share[:, None])
    return routed.outputs


def layer_errors(model: Path, candidates: dict[str, Path], tokens: torch.Tensor) -> dict[str, float]:
    """Return ‖Y − Ŷ‖ / ‖Y‖ of the MoE layers' outputs, root mean square over layers, on the original's inputs."""
    squares = dict.fromkeys(candidates, 0.0)
    with SourceModel(model) as source, tempfile.TemporaryDirectory() as temporary:
        decoder = Decoder(source, read_layout(source), torch.device("cpu"), torch.float32)
        store = first_hidden(decoder, tokens, Path(temporary))
        for index in range(len(decoder)):
            hidden = store.load(index)
            routed = route(decoder, index, hidden, store)
            exact = outputs(decoder, source, index, routed).clone()
            for name, folder in candidates.items():
                with SourceModel(folder) as dense:
                    found = outputs(decoder, dense, index, routed)
                squares[name] += float((found - exact).norm() / exact.norm()) ** 2
            routed.outputs.copy_(exact)
            finish(decoder, index, hidden, store.create(index + 1), routed.outputs)
            store.complete(index + 1)
        return {name: math.sqrt(square / len(decoder)) for name, square in squares.items()}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", default="128")
    parser.add_argument("--seq-len", default="512")
    args = parser.parse_args()
    text = (args.model / "held_out.txt").read_text(encoding="utf-8")
    quantizers = {
        "rtn": ("--quantizer", "rtn"),
        "hqq": ("--quantizer", "hqq"),
        "gptq, published": ("--data", str(TEXT), "--samples", args.samples, "--seq-len", args.seq_len, "--compat"),
        "gptq": ("--data", str(TEXT), "--samples", args.samples, "--seq-len", args.seq_len),
    }
    print("| widths | quantizer | layer error, calibration text | held-out text | held-out perplexity |")
    print("|---|---|---|---|---|")
    print(f"| original | | | | {perplexity(args.model, text, QUIET):.3f} |", flush=True)
    seen = calibration_text(args.model, str(TEXT), 16, 512, 0).tokens
    unseen = calibration_text(args.model, str(args.model / "held_out.txt"), 16, 512, 0).tokens
    for case, widths in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            dense = {}
            for name, flags in quantizers.items():
                folder, plain = Path(temporary) / name, Path(temporary) / f"{name}-dense"
                moeq = [str(Path(sys.executable).with_name("moeq")), "quantize", str(args.model), "-o", str(folder)]
                subprocess.run([*moeq, *widths, *flags], check=True, capture_output=True)
                export_dense(folder, plain, QUIET)
                dense[name] = plain
            known, new = layer_errors(args.model, dense, seen), layer_errors(args.model, dense, unseen)
            for name, folder in dense.items():
                value = perplexity(folder, text, QUIET)
                print(f"| {case} | {name} | {known[name]:.4f} | {new[name]:.4f} | {value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
