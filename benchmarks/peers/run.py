"""This benchmark quantizes a model's experts by other packages and by ours, and measures all results in one way.

    python benchmarks/peers/run.py --environments DIR --output results-peers

Only experts are quantized; other linears keep 16 bits. Bits contain scales and zero points. Each package gets a virtual
environment of its own in ``--environments``, made by pip when it is first needed. ``--output`` keeps a JSON file per
row; a row that has one is not measured again, so the same command continues a run that was killed. A row that failed
is tried again. After a change of our code name another folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # instead of the script's own folder, whose files would hide packages of their names

from benchmarks.common.mistakes import exit_status  # noqa: E402
from benchmarks.peers.asked import Asked  # noqa: E402
from benchmarks.peers.environments import Environments, FailedError  # noqa: E402
from benchmarks.peers.measure import measure, prepare  # noqa: E402
from benchmarks.peers.rows import OURS, PEERS, Row, all_rows  # noqa: E402
from benchmarks.peers.subject import check_model  # noqa: E402
from benchmarks.peers.table import table  # noqa: E402
from planner.common.progress import Progress  # noqa: E402
from planner.output.files import write_json  # noqa: E402
from vllm_moeq.format import MoeqError, UsageError, read_json  # noqa: E402

MODELS = ROOT / "benchmarks" / "models"
FIRST_TOKENS = 16_384


def count(text: str) -> int:
    """Return a positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return int(text)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "stdlib-mixtral")
    parser.add_argument("--held-out", type=Path, help="text to predict [held_out.txt in the model's folder]")
    parser.add_argument("--data", type=Path, default=MODELS / "calibration.jsonl", help="calibration text")
    parser.add_argument("--samples", type=count, default=128, metavar="N", help="sequences of it")
    parser.add_argument("--seq-len", type=count, default=512, metavar="N", help="tokens of each")
    parser.add_argument("--whole", action="store_true", help=f"the whole text, not its first {FIRST_TOKENS:,} tokens")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3), default=[2], help="widths of the codes")
    parser.add_argument("--only", nargs="+", choices=(*PEERS, OURS), help="these peers alone")
    parser.add_argument("--environments", type=Path, required=True, help="folder for virtual environments")
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--pip-flags", default="", help="such as '--extra-index-url URL', with CPU builds of torch")
    return parser.parse_args(given)


def asked_by(args: argparse.Namespace) -> Asked:
    """Return the flags that decide results.

    Raises:
        UsageError: a text that is not there.
    """
    held_out = args.held_out or args.model / "held_out.txt"
    for flag, path in (("--data", args.data), ("--held-out", held_out)):
        if not path.is_file():
            raise UsageError(f"{flag} {path}: expected a text, found no such file")
    return Asked(args.model, args.data, args.samples, args.seq_len, held_out, None if args.whole else FIRST_TOKENS)


def check_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Make the folder of results, or check that its results belong to the same model and texts.

    Raises:
        UsageError: they do not.
    """
    path = folder / "asked.json"
    if path.is_file() and (found := read_json(path)) != facts:
        name = next(name for name in facts if found.get(name) != facts[name])
        raise UsageError(f"{path}: {name}: expected {facts[name]!r}, found {found.get(name)!r}: name another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def results(rows: Sequence[Row], folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results that a folder has."""
    paths = {row.name: folder / f"{row.name}.json" for row in rows}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def run(args: argparse.Namespace, progress: Progress) -> list[str]:
    """Measure the rows that have no result, and return the lines of the table.

    Raises:
        MoeqError: a damaged model or text, results of another model.
    """
    asked = asked_by(args)
    folder, rows = args.output.resolve(), [row for row in all_rows() if row.bits in args.bits]
    environments = Environments(args.environments.resolve(), shlex.split(args.pip_flags))
    check_model(asked.model)
    check_folder(folder, asked.facts())
    environments.folder.mkdir(parents=True, exist_ok=True)
    prepare(asked, folder, progress)
    for row in rows:
        if "kl" in results([row], folder).get(row.name, {}) or (args.only and row.peer not in args.only):
            continue
        progress.line(f"{row.label}, {row.storage.bits:.2f} bits")
        try:
            found = measure(row, asked, folder, environments)
        except (FailedError, MoeqError) as error:
            found = {"failed": str(error)}
            progress.line(f"note: {row.label}: {error}")
        write_json(folder / f"{row.name}.json", {"label": row.label, **found})
    return table(rows, results(rows, folder))


def main(given: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    return exit_status(lambda: print("\n".join(run(arguments(given), Progress()))))


if __name__ == "__main__":
    sys.exit(main())
