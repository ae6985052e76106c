"""This script trains a small model's routers a little longer, for more even shares of the experts, and nothing else.

Balanced as training text is, an expert can still starve on other text. A minute with a greater weight of the balancing
loss gives it tokens, and costs hardly any perplexity:

    python -m benchmarks.models.even_routers stdlib-qwen3-moe -o stdlib-qwen3-moe-even
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common.mistakes import exit_status
from benchmarks.models.balance import layer_balance, shares
from benchmarks.models.corpus import encode, read_sources
from benchmarks.models.fit import SEQUENCE
from benchmarks.models.train_model import perplexity
from planner.output.files import write_json
from planner.output.paths import check_output

BATCH = 8
FILES = 500


def least_shares(model: PreTrainedModel, stream: torch.Tensor) -> list[float]:
    """Return each layer's least share of the choices over the mean share, on whole windows of a text."""
    windows = stream[: stream.numel() // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    total = torch.zeros(())
    with torch.inference_mode():
        for batch in windows.split(BATCH):
            logits = model(input_ids=batch, output_router_logits=True).router_logits
            total = total + shares(logits, model.config.num_experts_per_tok) * batch.shape[0]
    return [round(value, 2) for value in (total / total.mean(1, keepdim=True)).min(1).values.tolist()]


def even(model: PreTrainedModel, windows: torch.Tensor, steps: int, weight: float, learning_rate: float) -> None:
    """Train the routers on windows of tokens [any, sequence]; the rate falls to zero."""
    model.requires_grad_(False)
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith(".mlp.gate.weight")]
    for router in routers:
        router.requires_grad_(True)
    optimizer = torch.optim.Adam(routers, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        batch = windows[[(step * BATCH + row) % len(windows) for row in range(BATCH)]]
        out = model(input_ids=batch, output_router_logits=True)
        logits = out.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss = loss + weight * layer_balance(out.router_logits, model.config.num_experts_per_tok)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def run(source: Path, output: Path, steps: int, weight: float, learning_rate: float) -> None:
    """Write a copy of a model with evener routers, its new perplexity and what was done in training.json."""
    check_output(output)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts, _ = read_sources()
    random.Random(0).shuffle(texts)
    stream = encode(tokenizer, texts[:FILES])
    windows = stream[: stream.numel() // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    held_out = encode(tokenizer, [(source / "held_out.txt").read_text(encoding="utf-8")])
    print("least shares on the held-out text", least_shares(model, held_out), flush=True)
    even(model, windows, steps, weight, learning_rate)

    shutil.copytree(source, output)
    model.to(torch.bfloat16)
    model.config.output_router_logits = False
    model.save_pretrained(output)
    model.float()
    print("least shares on the held-out text", least_shares(model, held_out), flush=True)
    facts = json.loads((source / "training.json").read_text(encoding="utf-8"))
    facts |= {"router_steps": steps, "router_balance_weight": weight, "router_learning_rate": learning_rate}
    facts["held_out_perplexity"] = round(perplexity(model, held_out), 4)
    write_json(output / "training.json", facts)
    print(json.dumps(facts, indent=2))


def main(given: Sequence[str] | None = None) -> int:
    """Even out one model's routers; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--balance-weight", type=float, default=0.4)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    args = parser.parse_args(given)
    return exit_status(lambda: run(args.model, args.output, args.steps, args.balance_weight, args.learning_rate))


if __name__ == "__main__":
    sys.exit(main())
