"""This script trains the small Mixture-of-Experts models that the demo, the tests and the benchmarks run on.

The text is the source code of Python's own standard library, which every machine with Python has. The result is an
ordinary Hugging Face folder, and two things that a download never has. ``initial-router/`` holds the router weights
before training, which Definition 3.1 of the paper needs. ``held_out.txt`` holds files that training never saw.

    python benchmarks/models/train_model.py --architecture mixtral -o benchmarks/models/stdlib-mixtral

``--architecture mixtral-200m --device cuda`` makes a larger model, and reads the sources of installed packages too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

SEQUENCE = 512
END = "<|endoftext|>"
# Tests, tables and generated documentation are not code that a reader would write.
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}
HELD_OUT_BYTES = 200_000
LARGE = "mixtral-200m"
INSTALLED_CHARACTERS = 120_000_000
LONGEST_FILE = 200_000  # longer ones are mostly generated tables
TOKENIZER_CHARACTERS = 30_000_000

SHARED = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def architecture(name: str) -> PreTrainedConfig:
    """Return the configuration of one of the two models that are shipped, or of the larger one (170 M parameters)."""
    if name == LARGE:
        larger = {"vocab_size": 8192, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64}
        return MixtralConfig(
            **{**SHARED, **larger, "num_key_value_heads": 4},
            num_hidden_layers=12,
            intermediate_size=1024,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    if name == "mixtral":
        return MixtralConfig(
            **SHARED,
            num_hidden_layers=4,
            intermediate_size=256,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    return Qwen3MoeConfig(
        **SHARED,
        num_hidden_layers=2,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def read_sources() -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts); a file's side depends on its relative path only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] < 12 else train).append(text)
    return train, held_out


def read_installed(characters: int = INSTALLED_CHARACTERS) -> list[str]:
    """Return the sources of installed packages for training, spread over all packages where they are too many.

    None is held out: held-out texts are the standard library's, the same for all models.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    found = {path.relative_to(root): path for path in root.rglob("*.py")}
    mixed = sorted(found, key=lambda relative: hashlib.sha256(relative.as_posix().encode()).digest())
    texts: list[str] = []
    total = 0
    for relative in mixed:
        if SKIPPED.intersection(relative.parts) or found[relative].stat().st_size > LONGEST_FILE:
            continue
        texts.append(found[relative].read_text(encoding="utf-8", errors="replace"))
        total += len(texts[-1])
        if total > characters:
            break
    return texts


def limited(texts: list[str], characters: int) -> Iterator[str]:
    """Yield texts until there are enough characters."""
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def train_tokenizer(texts: list[str], vocabulary: int = int(SHARED["vocab_size"])) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a model's vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(texts, TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=1024)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one int64 token stream, an end token after each text."""
    parts = []
    for begin in range(0, len(texts), 1000):  # many at a time use all cores; all at once, too much memory
        for ids in tokenizer(texts[begin : begin + 1000])["input_ids"]:
            parts.append(torch.tensor([*ids, 0]))
    return torch.cat(parts)


def batches(stream: torch.Tensor, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield ``steps`` batches [batch, SEQUENCE] of random windows, each epoch a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    windows = stream.numel() // SEQUENCE - 1
    order: list[int] = []
    for _ in range(steps):
        rows = []
        for _ in range(batch):
            if not order:
                offset = int(torch.randint(SEQUENCE, (1,), generator=generator))
                order = [offset + i * SEQUENCE for i in torch.randperm(windows, generator=generator).tolist()]
            start = order.pop()
            rows.append(stream[start : start + SEQUENCE])
        yield torch.stack(rows)


def router_weights(model: PreTrainedModel, checkpoint_names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return the routers' weights [experts, hidden] under their checkpoint names."""
    state = model.state_dict()
    return {saved: state[name].detach().float().clone() for name, saved in checkpoint_names.items()}


def router_names(model: PreTrainedModel) -> dict[str, str]:
    """Map the in-memory router names to the names in a checkpoint, which differ for Mixtral."""
    names = [name for name in model.state_dict() if name.endswith(".mlp.gate.weight")]
    block = "block_sparse_moe" if model.config.model_type == "mixtral" else "mlp"
    return {name: name.replace(".mlp.gate.", f".{block}.gate.") for name in names}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, constant, then linear to zero over the last half."""
    return peak * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix [..., M, N] near 1 (five Newton-Schulz steps)."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Jordan, 2024), for stacks of matrices too.

    torch.optim.Muon takes 2-D parameters only, and the experts of a layer are one 3-D parameter. After
    220 steps it is half a nat ahead of AdamW on this model.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter once."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonalize(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * 0.1)
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, routers and norms."""
    outside = ("embed_tokens", "lm_head", ".gate.")
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim >= 2 and not any(part in name for part in outside)]
    rest = [p for name, p in named if p.ndim < 2 or any(part in name for part in outside)]
    return [Muon(inner, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]


def layer_balance(logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """Return the load-balancing loss of Switch Transformer, layer by layer, from logits [tokens, experts] each.

    transformers adds up the layers before it multiplies, so that an expert may starve in one layer if its namesake in
    another is busy: the shipped models, trained that way, have experts that hardly any token chooses.
    """
    losses = []
    for layer in logits:
        experts = layer.shape[1]
        probabilities = layer.float().softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=experts) / chosen.numel()
        losses.append(experts * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def fit(model: PreTrainedModel, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Train in place, printing a line every 50 steps."""
    steppers = optimizers(model)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    by_layer = balanced_by_layer(args)
    if by_layer:
        model.router_aux_loss_coef = 0.0
    began = time.monotonic()
    for step, tokens in enumerate(batches(stream, args.batch, args.steps, args.seed)):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        tokens = tokens.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            outputs = model(input_ids=tokens, labels=tokens)
        loss = outputs.loss
        if by_layer:
            balance = layer_balance(outputs.router_logits, model.config.num_experts_per_tok)
            loss = loss + model.config.router_aux_loss_coef * balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == args.steps - 1:
            speed = (step + 1) * tokens.numel() / (time.monotonic() - began)
            print(f"step {step:5d}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)


def balanced_by_layer(args: argparse.Namespace) -> bool:
    """Tell which load-balancing loss is used."""
    return (args.balance or ("layer" if args.architecture == LARGE else "model")) == "layer"


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


def main(given: Sequence[str] | None = None) -> None:
    """Train one model and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architecture", choices=["mixtral", "qwen3-moe", LARGE], default="mixtral")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {SEQUENCE} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--balance",
        choices=["model", "layer"],
        help="load-balancing loss over all layers at once (transformers' own, the shipped models') or for each layer "
        f"(default for {LARGE})",
    )
    parser.add_argument("--device", default="cpu", help="on cuda, layers compute in bfloat16")
    args = parser.parse_args(given)
    torch.manual_seed(args.seed)
    began = time.monotonic()

    config = architecture(args.architecture)
    train_texts, held_out_texts = read_sources()
    if args.architecture == LARGE:
        train_texts += read_installed()
    held_out = f"{END}".join(held_out_texts).encode()[:HELD_OUT_BYTES].decode(errors="ignore")
    tokenizer = train_tokenizer(train_texts, config.vocab_size)
    stream = encode(tokenizer, train_texts)
    print(f"{len(train_texts)} files, {stream.numel():,} tokens to train on", flush=True)

    model = AutoModelForCausalLM.from_config(config)
    names = router_names(model)
    initial = router_weights(model, names)
    fit(model.to(args.device), stream, args)

    model = model.to("cpu", torch.bfloat16)
    model.config.output_router_logits = False
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "initial-router").mkdir(exist_ok=True)
    save_file(initial, args.output / "initial-router" / "model.safetensors")
    (args.output / "held_out.txt").write_text(held_out, encoding="utf-8")

    reloaded = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(args.device)
    facts = {
        "architecture": args.architecture,
        "parameters": sum(p.numel() for p in reloaded.parameters()),
        "python": platform.python_version(),
        "steps": args.steps,
        "batch": args.batch,
        "sequence": SEQUENCE,
        "seed": args.seed,
        "training_tokens": args.steps * args.batch * SEQUENCE,
        "held_out_perplexity": round(perplexity(reloaded, encode(tokenizer, [held_out])), 4),
        "seconds": round(time.monotonic() - began),
    }
    if balanced_by_layer(args):
        facts["balance"] = "layer"
    (args.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
