"""This script repeats the synthetic experiment of the paper's Appendix A: Lemma 4.3 and Figures 4, 5 and 6.

    python benchmarks/replication/theory/run.py --output results-theory

It trains a two-layer MoE. The exit status is 1 if a statement of Lemma 4.3 is false in a run. Figure 6 is measured and
not checked.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)  # instead of the script's own folder, whose files would hide packages of their names

from benchmarks.replication.theory import plots  # noqa: E402
from benchmarks.replication.theory.bits import smallest_widths  # noqa: E402
from benchmarks.replication.theory.checks import (  # noqa: E402
    LemmaError,
    Run,
    all_gates,
    check,
    max_variance,
    names,
    proficiency,
    violations,
)
from benchmarks.replication.theory.model import Setting, pretrained, train  # noqa: E402
from benchmarks.replication.theory.report import Measured, readme  # noqa: E402
from planner.output.files import atomic, write_json  # noqa: E402

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.24)
QUICK = Setting(dim=64, experts=8, neurons=100, tokens=40, chosen=3, router_rate=0.002, batch=200)
QUICK_ALPHAS = (0.1, 0.2)


def measure(setting: Setting, alpha: float, seed: int) -> Measured:
    """Train one model and measure it; deterministic."""
    generator = torch.Generator().manual_seed(seed)
    model = pretrained(setting, generator)
    before, norms = all_gates(model, generator)[0], model.router.norm(dim=1)
    train(model, alpha, generator)
    own, opposite = all_gates(model, generator)
    change = model.router.norm(dim=1) - norms
    activations = model.activations()[torch.arange(setting.experts), model.aligned]
    projection = model.router.gather(1, (model.aligned % setting.dim)[:, None]).flatten()
    run = Run(
        seed=seed,
        alpha=alpha,
        steps=setting.steps(alpha),
        names=names(model),
        own_before=proficiency(before, setting.chosen),
        own=proficiency(own, setting.chosen),
        opposite=(opposite > 0).float().mean(dim=1).tolist(),
        gate=own.amin(dim=1).tolist(),
        norm_change=change.tolist(),
        activation=activations.tolist(),
        projection=projection.tolist(),
        variance=max_variance(model).tolist(),
    )
    neuron, equal = (smallest_widths(model, change, equal, generator) for equal in (False, True))
    return run, neuron, equal


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a small model, two α: to see it work")
    parser.add_argument("--seeds", type=int, default=3, help="models per α, default 3")
    parser.add_argument("--alphas", type=float, nargs="+", help="fractions of less prevalent tokens, each below 1/4")
    parser.add_argument("--router-rate", type=float, help="η_r; the expert rate is 0.2")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--duration", type=float, help="steps, in units of l²·√(log l)/α")
    args = parser.parse_args(given)
    args.alphas = args.alphas or list(QUICK_ALPHAS if args.quick else ALPHAS)
    if not all(0 < alpha < 0.25 for alpha in args.alphas):
        parser.error("--alphas: expected numbers between 0 and 0.25")
    if args.seeds < 1:
        parser.error("--seeds: expected at least 1")
    return args


def write(setting: Setting, measured: Sequence[Measured], command: str, seconds: float, output: Path) -> None:
    """Write figures, numbers and README.md."""
    runs, neuron, equal = zip(*measured, strict=True)
    plots.figure4(min(runs, key=lambda run: (abs(run.alpha - 0.1), run.seed)), output / "theory-figure4.png")
    plots.figure5(runs, output / "theory-figure5.png")
    plots.figure6(runs, neuron, equal, output / "theory-figure6.png")
    rows = [
        {**run.as_dict(), "violations": violations(run), "neuron": own.as_dict(), "equal": same.as_dict()}
        for run, own, same in measured
    ]
    write_json(
        output / "theory.json", {"command": command, "seconds": seconds, "setting": asdict(setting), "runs": rows}
    )
    with atomic(output / "README.md") as temporary:
        temporary.write_text(readme(setting, measured, command, seconds), encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    """Train, measure, write, then check; exit status 1 where Lemma 4.3 does not hold."""
    args = arguments(given)
    words = sys.argv[1:] if given is None else given
    command = shlex.join(["python", "benchmarks/replication/theory/run.py", *words])
    changes = {name: getattr(args, name) for name in ("router_rate", "batch", "duration")}
    setting = QUICK if args.quick else Setting()
    setting = replace(setting, **{name: value for name, value in changes.items() if value is not None})
    args.output.mkdir(parents=True, exist_ok=True)
    began, measured = time.monotonic(), []
    for alpha in sorted(args.alphas):
        for seed in range(args.seeds):
            measured.append(measure(setting, alpha, seed))
            print(f"α {alpha:g}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    write(setting, measured, command, round(time.monotonic() - began, 1), args.output)
    print(f"wrote {args.output / 'README.md'}", flush=True)
    try:
        check(run for run, *_ in measured)
    except LemmaError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small; and sums then do not depend on the machine
    sys.exit(main())
