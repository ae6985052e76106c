"""This script trains the small Mixture-of-Experts models that the demo, the tests and the benchmarks run on.

The text is the source code of Python's own standard library, and as much of the installed packages' as the training
reads without repeating itself. The result is an ordinary Hugging Face folder, and two things that a download never has.
``initial-router/`` holds the router weights before training, which Definition 3.1 of the paper needs. ``held_out.txt``
holds files that training never saw.

    python -m benchmarks.models.train_model --architecture mixtral -o stdlib-mixtral

``--architecture mixtral-200m --device cuda`` makes a larger model. A killed training continues with the same command,
from its last checkpoint in ``<output>.partial``; the installed packages must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.common.mistakes import exit_status
from benchmarks.models.architectures import NAMES, architecture
from benchmarks.models.corpus import END, encode, read_installed, read_sources, train_tokenizer
from benchmarks.models.fit import SEQUENCE, Training, fit
from planner.output.files import write_json
from planner.output.paths import check_output
from planner.output.unfinished import PartialRun

HELD_OUT_BYTES = 200_000
CHARACTERS_PER_TOKEN = 2.7  # no text is read twice: a model that knows its text by heart loses more than others


def router_weights(model: PreTrainedModel, checkpoint_names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return the routers' weights [experts, hidden] under their checkpoint names."""
    state = model.state_dict()
    return {saved: state[name].detach().float().clone() for name, saved in checkpoint_names.items()}


def router_names(model: PreTrainedModel) -> dict[str, str]:
    """Map the in-memory router names to the names in a checkpoint, which differ for Mixtral."""
    names = [name for name in model.state_dict() if name.endswith(".mlp.gate.weight")]
    block = "block_sparse_moe" if model.config.model_type == "mixtral" else "mlp"
    return {name: name.replace(".mlp.gate.", f".{block}.gate.") for name in names}


@torch.inference_mode()
def perplexity(model: PreTrainedModel, stream: torch.Tensor, window: int = 512) -> float:
    """Return exp(mean negative log-likelihood) over consecutive windows of ``window`` tokens."""
    total, count = 0.0, 0
    for start in range(0, stream.numel() - 1, window):
        tokens = stream[start : start + window + 1][None].to(model.device)
        logits = model(input_ids=tokens[:, :-1], output_router_logits=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + tokens.numel() - 1
    return math.exp(total / count)


def train(name: str, output: Path, training: Training, device: str = "cpu", resume: bool = True) -> None:
    """Train a model and write its folder, which appears when it is whole. Continue a killed training.

    Args:
        name: one of :data:`benchmarks.models.architectures.NAMES`.
        output: the folder to create.
        training: the settings.
        device: device to train on.
        resume: continue an unfinished training; otherwise delete it.

    Raises:
        MoeqError: the output exists, an unfinished training had other settings or another text, a full disk.
    """
    check_output(output)
    torch.manual_seed(training.seed)
    config = architecture(name)
    texts, held_out_texts = read_sources()
    held_out = f"{END}".join(held_out_texts).encode()[:HELD_OUT_BYTES].decode(errors="ignore")
    tokenizer = train_tokenizer(texts, config.vocab_size)
    wanted = round(CHARACTERS_PER_TOKEN * training.steps * training.batch * SEQUENCE)
    texts += read_installed(max(0, wanted - sum(map(len, texts))))
    stream = encode(tokenizer, texts)
    print(f"{len(texts)} files, {stream.numel():,} tokens to train on", flush=True)

    decides = {key: value for key, value in asdict(training).items() if key != "checkpoint"}
    text = hashlib.sha256(stream.numpy().tobytes()).hexdigest()
    run = PartialRun(output, {"architecture": name, **decides, "text": text}, resume)
    try:
        model = AutoModelForCausalLM.from_config(config)
        initial = router_weights(model, router_names(model))
        began = time.monotonic()
        fit(model.to(device), stream, training, run.folder / "state.pt")
        print(f"trained in {time.monotonic() - began:.0f} s", flush=True)
        whole = run.folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)  # of a killed run
        write(whole, model, tokenizer, initial, held_out)
        facts = {"architecture": name, **asdict(training), **measured(whole, tokenizer, held_out, training, device)}
        write_json(whole / "training.json", facts)
        whole.rename(output)
        shutil.rmtree(run.folder)
    finally:
        run.release()
    print(json.dumps(facts, indent=2))


def write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    initial: dict[str, torch.Tensor],
    held_out: str,
) -> None:
    """Write the model in bfloat16, its tokenizer, its routers before training and the held-out text."""
    model = model.to("cpu", torch.bfloat16)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "initial-router").mkdir()
    save_file(initial, folder / "initial-router" / "model.safetensors")
    (folder / "held_out.txt").write_text(held_out, encoding="utf-8")


def measured(
    folder: Path, tokenizer: PreTrainedTokenizerFast, held_out: str, training: Training, device: str
) -> dict[str, float | str]:
    """Return what is known of a trained model after training."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "sequence": SEQUENCE,
        "training_tokens": training.steps * training.batch * SEQUENCE,
        "held_out_perplexity": round(perplexity(model, encode(tokenizer, [held_out])), 4),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Train one model and write its folder; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architecture", choices=NAMES, default=NAMES[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--batch", type=int, default=Training.batch, help=f"sequences of {SEQUENCE} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--balance-weight", type=float, default=Training.balance_weight, help="of each layer's loss")
    parser.add_argument("--checkpoint", type=int, default=Training.checkpoint, help="steps between two checkpoints")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(given)
    for flag in ("steps", "batch", "checkpoint"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag}: expected a number of at least 1, found {getattr(args, flag)}")
    training = Training(args.steps, args.batch, args.learning_rate, args.seed, args.balance_weight, args.checkpoint)
    return exit_status(lambda: train(args.architecture, args.output, training, args.device, args.resume))


if __name__ == "__main__":
    sys.exit(main())
