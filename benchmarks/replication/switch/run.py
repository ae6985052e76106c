"""This script repeats the paper's experiment on a fine-tuned Switch Transformer with a small model.

    python benchmarks/replication/switch/run.py --output results-switch

The experiment is that of section 5.1, Figure 2, Tables 3 and 4. The script pre-trains a Switch Transformer on Python
sources, fine-tunes it to describe functions in a sentence, and quantizes its experts to 2 and 3 bits in several orders.
``DIR/model`` keeps the trained models and ``DIR/scores`` the scores of every quantized one. So the same command
continues a run that was killed. ``DIR/switch.md`` has the tables.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)  # instead of the script's own folder, whose files would hide packages of their names

from benchmarks.common.results import environment  # noqa: E402
from benchmarks.replication.paper.run import as_csv  # noqa: E402
from benchmarks.replication.switch import report  # noqa: E402
from benchmarks.replication.switch.bench import OURS, Bench  # noqa: E402
from benchmarks.replication.switch.quantize import Scores, moved, orders  # noqa: E402
from benchmarks.replication.switch.stages import STARTS, finetune, pretrain  # noqa: E402
from benchmarks.replication.switch.text import Text, prepare  # noqa: E402
from benchmarks.replication.switch.train import QUICK, Model, Recipe, Routers, routers  # noqa: E402
from planner.output.files import atomic, write_json  # noqa: E402
from planner.sensitivity import router_norm  # noqa: E402
from vllm_moeq.format import MoeqError  # noqa: E402

AVERAGES = {(2, 3): ("2.125", "2.25", "2.5", "2.75"), (1, 2): ("1.25", "1.5", "1.75")}
"""Widths to choose from → averages: the paper's, and lower ones, for two bits hardly hurt this model."""

TABLE4 = ("2.25", "2.5", "2.75")
SEEDS = 3

Row = dict[str, Any]


def expert_rows(start: str, scores: dict[str, Scores]) -> list[Row]:
    """Return what is known of every expert."""
    return [
        {"start": start, "layer": layer, "expert": expert}
        | {name: values[expert] for name, values in vars(found).items()}
        for layer, found in scores.items()
        for expert in range(len(found.norm))
    ]


def correlations(since: str, norms: dict[str, list[float]], changes: dict[str, list[float]]) -> list[Row]:
    """Return how alike final norm and change of norm rank the experts of each layer (Table 3)."""
    return [
        {
            "since": since,
            "layer": layer,
            "spearman": float(spearmanr(norms[layer], changes[layer]).statistic),
            "kendall": float(kendalltau(norms[layer], changes[layer]).statistic),
        }
        for layer in norms
    ]


def whole_training(first: Routers, model: Model) -> list[Row]:
    """Return the correlations where w^(0) are the routers before pre-training."""
    last = routers(model)
    norms = {layer: router_norm(router) for layer, router in last.items()}
    changes = {layer: router_norm(router, first[layer]) for layer, router in last.items()}
    return correlations("random, before pre-training", norms, changes)


def experiment(output: Path, recipe: Recipe, quick: bool) -> Row:
    """Train, quantize and evaluate; return everything that was found."""
    text = prepare(output / "model" / "text", quick)
    if quick:
        text = replace(text, held_out=text.held_out[:24])
    pretrained = pretrain(output / "model", text, recipe)
    benches, training = {}, {"pre-training": pretrained.facts}
    for start in STARTS:
        trained = finetune(output / "model", text, recipe, start)
        training[start] = trained.facts
        benches[start] = Bench(text, trained, start, output / "scores" / STARTS[start], quick)
    found: Row = {"training": training, "rows": figure2(benches["pre-trained"], quick)}
    found["differences"] = [
        {"choices": joined(choices)} | row
        for choices, averages in AVERAGES.items()
        for row in benches["pre-trained"].differences(averages)
    ]
    found["samples"] = samples(text, benches["pre-trained"])
    found["rows"] += table4(benches["random"], quick)
    found["correlations"] = [row for bench in benches.values() for row in table3(bench)]
    found["correlations"] += whole_training(pretrained.initial, benches["pre-trained"].shelf.model)
    found["experts"] = [row for start, bench in benches.items() for row in expert_rows(start, bench.scores)]
    ordered = {start: orders(bench.scores) for start, bench in benches.items()}
    found["moved"] = {start: moved(by[OURS], by["change"]) for start, by in ordered.items()}
    found["examples"] = {"train": len(text.train), "held_out": len(text.held_out), "stream": text.stream.numel()}
    return found


def joined(choices: Sequence[int]) -> str:
    """Return widths as the tables name them."""
    return ",".join(map(str, choices))


def figure2(bench: Bench, quick: bool) -> list[Row]:
    """Return all orders at all averages."""
    rows = list(bench.ends((1, 2, 3)))
    for choices, averages in AVERAGES.items():
        some = averages[1:2] if quick else averages
        rows += bench.mixed(orders(bench.scores), choices, some, 1 if quick else SEEDS)
    return rows


def table4(bench: Bench, quick: bool) -> list[Row]:
    """Return change of norm against final norm, where routers began with little variance."""
    ordered = orders(bench.scores)
    chosen = {name: ordered[name] for name in ("change", "norm")}
    return [*bench.ends((2, 3)), *bench.mixed(chosen, (2, 3), TABLE4[:1] if quick else TABLE4, 0)]


def table3(bench: Bench) -> list[Row]:
    """Return the correlations within fine-tuning."""
    norms, changes = (
        {name: getattr(layer, what) for name, layer in bench.scores.items()} for what in ("norm", "change")
    )
    return correlations(f"{bench.start}, before fine-tuning", norms, changes)


def samples(text: Text, bench: Bench, count: int = 12) -> list[Row]:
    """Return what the original model and a uniform 2-bit one wrote for some examples."""
    original, low = bench.outcomes["original", 32.0, 0], bench.outcomes["uniform", 2.0, 0]
    step = max(1, len(text.held_out) // count)
    return [
        {"target": text.held_out[i].target, "original": original.written[i], "uniform 2 bits": low.written[i]}
        for i in range(0, len(text.held_out), step)
    ]


def markdown(found: Row) -> str:
    """Return the tables."""
    examples, training = found["examples"], found["training"]
    lines = ["# Switch Transformer", ""]
    lines += [
        f"{training['pre-training']['parameters']:,} parameters; {examples['train']:,} functions to fine-tune on, "
        f"{examples['held_out']} held out. Brackets: 95% by bootstrap over examples; random: mean ± standard deviation "
        "over seeds.",
        "",
    ]
    rows = found["rows"]
    for choices in AVERAGES:
        name = joined(choices)
        lines += [f"## Figure 2: choices {name}", "", *report.scores_table(rows, "pre-trained", choices)]
        differences = [row for row in found["differences"] if row["choices"] == name]
        lines += ["Mean over averages, paired:", "", *report.differences_table(differences), ""]
    lines += [f"MaxVar moves up {found['moved']['pre-trained']} experts.", ""]
    lines += [
        "## Table 4: routers of little variance before fine-tuning",
        "",
        *report.scores_table(rows, "random", (2, 3)),
    ]
    lines += ["## Table 3: final norm and change of norm", "", *report.correlations_table(found["correlations"]), ""]
    lines += ["## Experts", "", *report.experts_table(found["experts"]), ""]
    return "\n".join([*lines, "![ROUGE-2 and loss against average bits](switch.png)", ""])


def main(given: Sequence[str] | None = None) -> int:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a tiny model, trained for a few steps: to see it work")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(given)
    began = time.monotonic()
    try:
        found = experiment(args.output, replace(QUICK if args.quick else Recipe(), seed=args.seed), args.quick)
    except MoeqError as error:
        print(error, file=sys.stderr)
        return 1
    words = sys.argv[1:] if given is None else given
    found["command"] = shlex.join(["python", "benchmarks/replication/switch/run.py", *words])
    found["seconds"] = round(time.monotonic() - began, 1)
    found |= environment(torch.device("cpu")) | {"threads": torch.get_num_threads()}
    report.draw(found["rows"], "pre-trained", list(AVERAGES), args.output / "switch.png")
    for name, content in (("switch.md", markdown(found)), ("switch.csv", as_csv(found["rows"]))):
        with atomic(args.output / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    write_json(args.output / "switch.json", found)
    print(f"wrote {args.output / 'switch.md'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
