"""Build a tiny model of every family of ``families.py``, quantize, verify and calibrate it: a table of what happens.

python -m benchmarks.coverage [--serve] [FAMILY …]

With --serve, vLLM serves each of them too, half a minute each, and its greedy tokens are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import planner
from benchmarks.greedy import ServingError, compare, declare_operators
from benchmarks.models.families import FAMILIES, build, classes
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import advance
from planner.calibration.reading.routed import first_hidden
from planner.model.layout import architecture_of, read_layout
from planner.model.source import SourceModel
from planner.model.whole import check_checkpoint

TEXT = Path(__file__).with_name("models") / "calibration.jsonl"

CLOSE = 1e-4
"""Largest relative distance of logits computed layer by layer from transformers' own, in float32."""

COLUMNS = {
    "quantized": "quantized, verified",
    "calibrated": "calibrated",
    "served": "experts computed by our kernels",
    "answered": "served: same tokens",
}
"""Step → its column of the table; the last is there with --serve."""


@dataclass
class Outcome:
    """What happened to one family.

    Attributes:
        name: the family.
        quantized: "yes", or the error in one line.
        calibrated: the same of quantizing with a text, which runs it layer by layer.
        served: "yes", or the reason why our kernels do not compute its experts.
        answered: "yes" if vLLM's greedy tokens are right, else its reason; None if it was not asked.
        broken: whether an error was no refusal but an exception.
        said: the lines of progress.
    """

    name: str
    quantized: str = "no"
    calibrated: str = "no"
    served: str = "no"
    answered: str | None = None
    broken: bool = False
    said: list[str] = field(default_factory=list)


def quantize(folder: Path, output: Path, said: list[str], **text: Any) -> str:
    """Quantize a model and check every tensor of the output.

    Args:
        folder: the model.
        output: the checkpoint to write.
        said: gets the lines of progress.
        text: arguments of :func:`planner.quantize` besides; without any, weights are rounded.
    """
    how = text or {"quantizer": "rtn"}
    planner.quantize(
        str(folder),
        output=str(output),
        avg_bits=2.5,
        group_size=32,
        progress=lambda event: said.append(str(event)),
        **how,
    )
    check_checkpoint(output)
    return "yes"


def calibrate(name: str, folder: Path, work: Path) -> str:
    """Check a model's forward pass layer by layer, and quantize it with a text by the default method and quantizer.

    Args:
        name: the family.
        folder: the model.
        work: folder for other files.

    Raises:
        ValueError: the forward pass gives other logits than transformers'.
    """
    error = distance(name, folder, work)
    if not error < CLOSE:
        raise ValueError(f"logits differ from transformers' by {error:.2g}")
    return quantize(folder, work / "calibrated", [], data=str(TEXT), samples=4, seq_len=32)


@torch.no_grad()
def distance(name: str, folder: Path, work: Path) -> float:
    """Return the relative distance of logits that are computed one layer at a time from transformers' own.

    Args:
        name: the family.
        folder: the model.
        work: folder for hidden states.
    """
    tokens = torch.randint(5, 2000, (2, 24), generator=torch.Generator().manual_seed(1))
    with SourceModel(folder) as source:
        decoder = Decoder(source, read_layout(source), torch.device("cpu"), torch.float32)
        store = first_hidden(decoder, tokens, work)
        for index in range(len(decoder)):
            advance(decoder, index, store.load(index), store.create(index + 1), store)
            store.complete(index + 1)
        with decoder.head() as head:
            logits = head(store.load(len(decoder)).flatten(0, 1))
    config, kind = classes(name)
    model = kind.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    expected = model(input_ids=tokens, use_cache=False).logits
    return float((logits.reshape(expected.shape) - expected).norm() / expected.norm())


def outcome(name: str, folder: Path, serve: bool = False) -> Outcome:
    """Return what happens to one family.

    Args:
        name: the family.
        folder: an empty folder for its files.
        serve: whether to have vLLM serve it too.
    """
    found = Outcome(name)
    try:
        build(name, folder / "model")
    except AttributeError as error:
        found.quantized = found.calibrated = found.served = str(error)
        found.answered = str(error) if serve else None
        return found

    def attempt(do: Callable[[], str]) -> str:
        try:
            return do()
        except (planner.MoeqError, ServingError) as error:
            return str(error).replace(str(folder / "model"), name)
        except Exception as error:  # what this table is there to show
            found.broken = True
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"

    found.quantized = attempt(lambda: quantize(folder / "model", folder / "quantized", found.said))
    found.calibrated = attempt(lambda: calibrate(name, folder / "model", folder))
    found.served = attempt(lambda: _served(folder / "model"))
    if serve:
        ready = found.quantized == found.served == "yes"
        found.answered = attempt(lambda: compare(name, folder / "quantized", folder / "dense")) if ready else "no"
    return found


def _served(folder: Path) -> str:
    with SourceModel(folder) as source:
        return architecture_of(source).unserved or "yes"


def outcomes(names: Iterable[str], serve: bool = False) -> Iterator[Outcome]:
    """Yield what happens to some families.

    Args:
        names: the families.
        serve: whether to have vLLM serve them too.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield outcome(name, Path(folder), serve)


def _cells(row: Outcome) -> list[str]:
    return [cell for cell in (getattr(row, key) for key in COLUMNS) if cell is not None]


def line(row: Outcome) -> str:
    """Return a family's line of the table."""
    cells = [_short(cell) for cell in _cells(row)]
    # A reason that stands to the left is not said again.
    shown = [cell if _good(cell) or cell not in cells[:place] else "no" for place, cell in enumerate(cells)]
    return f"| `{row.name}` | {' | '.join(shown)} |\n"


def _good(cell: str) -> bool:
    return cell.startswith("yes")


def _short(cell: str) -> str:
    """Return an outcome without what all refusals have in common."""
    _, _, attribute = cell.partition("transformers' ")
    return cell if _good(cell) or cell == "no" else f"no: {(attribute or cell).partition('; ')[0]}"


def table(found: Iterable[Outcome]) -> str:
    """Return the table, with the number of families that pass each step."""
    rows = list(found)
    columns = [title for key, title in COLUMNS.items() if any(getattr(row, key) is not None for row in rows)]
    counts = [sum(map(_good, cells)) for cells in zip(*map(_cells, rows), strict=True)]
    total = " | ".join(f"{count} of {len(rows)}" for count in counts)
    header = f"| family | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    return f"{header}{''.join(map(line, rows))}| all | {total} |\n"


def main(arguments: list[str]) -> int:
    """Print the table; return 1 if a family ended in anything but success or a refusal in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="have vLLM serve each family and compare its tokens")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if left out")
    asked = parser.parse_args(arguments)
    declare_operators()
    found = list(outcomes(asked.families or FAMILIES, asked.serve))
    print(table(found), end="")
    return int(any(row.broken for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
