"""This benchmark shows the gain of calibration: KL divergence and perplexity of a model by each quantizer of grids.

    python benchmarks/quantizing/calibrated.py benchmarks/models/stdlib-mixtral --output results-calibrated

``--output`` keeps a JSON file per row. A row that has one is not measured again, so the same command continues a run
that was killed. After a change of the code or the model name another folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # instead of the script's own folder, whose files would hide packages of their names

import planner  # noqa: E402
from benchmarks.common.mistakes import exit_status  # noqa: E402
from planner.common.progress import Progress  # noqa: E402
from planner.output.files import write_json  # noqa: E402
from vllm_moeq.format import UsageError, read_json  # noqa: E402

CALIBRATION = ROOT / "benchmarks" / "models" / "calibration.jsonl"

WIDTHS: dict[str, dict[str, Any]] = {
    "uniform 2": {"method": "uniform", "avg_bits": 2, "bits": "2"},
    "uniform 3": {"method": "uniform", "avg_bits": 3, "bits": "3"},
    "the paper's rule, 2.5": {"method": "router-norm-maxvar", "avg_bits": 2.5, "bits": "2,3"},
}
"""Label → keywords that decide the widths."""

QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": "rtn"},
    "hqq": {"quantizer": "hqq"},
    "gptq, published": {"quantizer": "gptq", "compat": True},
    "gptq, symmetric": {"quantizer": "gptq", "calibration": "symmetric"},
    "gptq": {"quantizer": "gptq"},
}
"""Label → keywords that decide the codes. Those of GPTQ read the calibration text."""

HEADER = "| widths | quantizer | KL | 99% | max | perplexity |"


def measured(model: Path, held_out: Path, keywords: dict[str, Any]) -> dict[str, float]:
    """Quantize the model, and return its KL divergence to the original (nats per token) and the perplexities of both.

    Raises:
        MoeqError: a damaged model or text.
    """
    with tempfile.TemporaryDirectory() as temporary:
        made = planner.quantize(model, output=Path(temporary) / "made", **keywords)
        found = planner.evaluate(made.output, data=str(held_out), reference=str(model), save=False)
    text = found.as_dict()
    return {**text["kl"], "perplexity": text["perplexity"], "original": text["reference_perplexity"]}


def run(model: Path, output: Path, samples: int, length: int) -> list[str]:
    """Measure the rows that have no result, and return the lines of the table.

    Raises:
        MoeqError: a damaged model or text.
    """
    progress, held_out = Progress(), model / "held_out.txt"
    if not held_out.is_file():
        raise UsageError(f"{held_out}: expected a text, found no such file")
    output.mkdir(parents=True, exist_ok=True)
    text = {"data": str(CALIBRATION), "samples": samples, "seq_len": length}
    rows = []
    for case, widths in WIDTHS.items():
        for name, quantizer in QUANTIZERS.items():
            path = output / f"{case} {name}.json".replace(",", "").replace("'", "").replace(" ", "-")
            if not path.is_file():
                progress.line(f"{case}, {name}")
                read = text if quantizer["quantizer"] == "gptq" else {}
                write_json(path, measured(model, held_out, {**widths, **quantizer, **read}))
            found = read_json(path)
            numbers = f"{found['mean']:.4f} | {found['p99']:.2f} | {found['max']:.1f} | {found['perplexity']:.3f}"
            rows.append(f"| {case} | {name} | {numbers} |")
    original = f"| original | | | | | {found['original']:.3f} |"
    return [HEADER, "|---" * (HEADER.count("|") - 1) + "|", original, *rows]


def main() -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="sequences of the calibration text")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of each")
    args = parser.parse_args()
    return exit_status(lambda: print("\n".join(run(args.model, args.output, args.samples, args.seq_len))))


if __name__ == "__main__":
    sys.exit(main())
