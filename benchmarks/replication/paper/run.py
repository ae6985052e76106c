"""This script repeats the paper's tables and figures, a part each, on models that fit this machine.

    python benchmarks/replication/paper/run.py --output results-paper

The default models are the two shipped ones. If the command runs again with flags that lead to the same numbers, it
skips the parts that are finished. A part that was killed continues with the models that it has not evaluated.
``DIR/README.md`` collects all parts.

On a machine with a CUDA GPU, ``--testbed FOLDER`` also evaluates a Mixtral of 170 M parameters. If the folder does not
hold that model yet, it is trained first. ``--train-testbed`` trains it on any machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)  # instead of the script's own folder, whose files would hide packages of their names

from benchmarks.common.results import environment  # noqa: E402
from benchmarks.models.architectures import LARGE  # noqa: E402
from benchmarks.models.fit import Training  # noqa: E402
from benchmarks.models.train_model import train  # noqa: E402
from benchmarks.replication.paper import curves, experts, maxvar, tables  # noqa: E402
from benchmarks.replication.paper.common import Asked, Bench, Result, markdown_table  # noqa: E402
from planner.common.memory import return_large_blocks  # noqa: E402
from planner.model.source import SourceModel  # noqa: E402
from planner.output.files import atomic, write_json  # noqa: E402
from vllm_moeq.format import MoeqError, read_json  # noqa: E402

MODELS = ROOT / "benchmarks" / "models"
SHIPPED = (MODELS / "stdlib-mixtral", MODELS / "stdlib-qwen3-moe")
PARTS: dict[str, Callable[[Bench], Result]] = {
    "figure9": maxvar.figure9,
    "figure10": experts.figure10,
    "figure11": experts.figure11,
    "figure2": curves.figure2,
    "table5": tables.table5,
    "table2": tables.table2,
    "table1": tables.table1,
    "figure7": curves.figure7,
    "figure8": curves.figure8,
}
"""The parts, in the order in which they run: cheap ones first."""

ORDER = ("table1", "table2", "table5", "figure2", "figure7", "figure8", "figure9", "figure10", "figure11")
"""The order in which parts are shown."""

VERSION = 1
"""The version of the parts' computations: if it changes, finished parts run again."""

QUICK: dict[str, Any] = {"samples": 8, "length": 128, "window": 128, "max_tokens": 2048, "seeds": 2}


def run_part(bench: Bench, name: str, command: str) -> bool:
    """Run a part unless its results are there; say whether it succeeded.

    The JSON file is written last: a part that has one is finished.
    """
    path = bench.output / f"{name}.json"
    asked = [VERSION, bench.asked.seeds, bench.asked.quick, bench.fingerprint()]
    if path.is_file() and read_json(path)["fingerprint"] == asked:
        print(f"{bench.folder.name} {name}: finished before", flush=True)
        return True
    print(f"{bench.folder.name} {name}: begins", flush=True)
    began = time.monotonic()
    try:
        result = PARTS[name](bench)
    except MoeqError as error:
        print(f"{bench.folder.name} {name}: {error}", file=sys.stderr, flush=True)
        return False
    seconds = round(time.monotonic() - began, 1)
    text = "\n".join([f"# {bench.folder.name}: {result.title}", "", *body(result.lines, result.images, Path(".")), ""])
    for suffix, content in ((".md", text), (".csv", as_csv(result.rows))):
        with atomic(path.with_suffix(suffix)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    facts = {"fingerprint": asked, "part": name, "seconds": seconds, "command": command, **where(bench.device)}
    write_json(path, {**facts, **vars(result)})
    print(f"{bench.folder.name} {name}: {seconds} s", flush=True)
    return True


def where(device: torch.device) -> dict[str, Any]:
    """Return what a number may depend on besides the flags."""
    found = environment(device)
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    if git.returncode == 0:
        found["versions"]["commit"] = git.stdout.strip()
    return {**found, "threads": torch.get_num_threads()}


def body(lines: Sequence[str], images: Sequence[str], folder: Path) -> list[str]:
    """Return a part's Markdown with its images, which are in a folder."""
    return [*lines, *(f"\n![{Path(image).stem}]({(folder / image).as_posix()})" for image in images)]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per row; columns are all keys with plain values."""
    plain = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in plain for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return file.getvalue()


def gather(output: Path) -> str:
    """Return README.md: every finished part of every model, whichever run finished it."""
    paths = [folder / f"{name}.json" for folder in sorted(output.iterdir()) for name in ORDER]
    found = [read_json(path) | {"model": path.parent.name} for path in paths if path.is_file()]
    lines = ["# The paper's tables and figures", ""]
    header = ["model", "part", "seconds", "date", "device", "threads", "versions"]
    runs = []
    for part in found:
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        link = f"[{part['part']}]({part['model']}/{part['part']}.md)"
        runs.append([part["model"], link, part["seconds"], part["date"], part["device"], part["threads"], versions])
    lines += [*markdown_table(header, runs), "", "Commands:", ""]
    lines += [f"    {command}" for command in dict.fromkeys(part["command"] for part in found)]
    for part in found:
        lines += ["", f"## {part['model']}: {part['title']}", ""]
        lines += body(part["lines"], part["images"], Path(part["model"]))
    return "\n".join(lines) + "\n"


def train_testbed(folder: Path, steps: int, batch: int, device: str) -> None:
    """Train the larger model, unless it is there."""
    if (folder / "training.json").is_file():  # written last
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    train(LARGE, folder, Training(steps, batch, learning_rate=3e-3), device)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse and complete the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, nargs="+", metavar="FOLDER", help="with held_out.txt; default: shipped")
    parser.add_argument("--quantizer", choices=["gptq", "hqq"], help="default: gptq, with --quick hqq")
    parser.add_argument("--quick", action="store_true", help="one model, little text, two averages: to see it work")
    parser.add_argument("--parts", default=",".join(ORDER), metavar="LIST", help=f"of {','.join(ORDER)}")
    parser.add_argument("--data", type=Path, default=MODELS / "calibration.jsonl", help="calibration text")
    parser.add_argument("--samples", type=int, help="calibration sequences, default 128")
    parser.add_argument("--length", type=int, help="tokens of each, default 512")
    parser.add_argument("--window", type=int, help="tokens of context of the evaluation, default 512")
    parser.add_argument("--max-tokens", type=int, help="of the held-out text, default all")
    parser.add_argument("--seeds", type=int, help="of random orders, default 3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--testbed", type=Path, metavar="FOLDER", help="of the larger model")
    parser.add_argument("--train-testbed", action="store_true", help="train it on any machine")
    parser.add_argument("--testbed-steps", type=int, default=3000)
    parser.add_argument("--testbed-batch", type=int, default=32, help="sequences of 512 tokens per step")
    args = parser.parse_args(given)
    args.parts = args.parts.split(",")
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts: expected some of {', '.join(ORDER)}, found {', '.join(unknown)}")
    if args.train_testbed and args.testbed is None:
        args.testbed = args.output / "testbed" / LARGE  # apart from its results
    if args.models is None:
        args.models = list(SHIPPED[:1] if args.quick else SHIPPED)
    return args


def asked(args: argparse.Namespace) -> Asked:
    """Return what decides the numbers: what is given, else what --quick stands for, else the defaults."""
    given = {name: getattr(args, name) for name in QUICK if getattr(args, name) is not None}
    quantizer = args.quantizer or ("hqq" if args.quick else "gptq")
    return Asked(
        quantizer, args.data, device=args.device, quick=args.quick, **{**(QUICK if args.quick else {}), **given}
    )


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts and gather them; exit status 1 where one failed, 2 for bad input."""
    args = arguments(given)
    command = shlex.join(["python", "benchmarks/replication/paper/run.py", *(sys.argv[1:] if given is None else given)])
    args.output.mkdir(parents=True, exist_ok=True)
    if args.testbed is not None:
        if args.train_testbed or torch.cuda.is_available():
            try:
                train_testbed(args.testbed, args.testbed_steps, args.testbed_batch, args.device)
            except MoeqError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        args.models.append(args.testbed)
    return_large_blocks()
    fine = True
    for name in (name for name in PARTS if name in args.parts):
        for folder in args.models:
            output = args.output / folder.name
            output.mkdir(exist_ok=True)
            with SourceModel(folder) as model:
                fine &= run_part(Bench(model, output, asked(args)), name, command)
            with atomic(args.output / "README.md") as temporary:
                temporary.write_text(gather(args.output), encoding="utf-8")
    print(f"wrote {args.output / 'README.md'}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
