"""This script writes a checkpoint with random weights to measure speed: a few layers of a published model.

    python benchmarks/serving/random_model.py qwen3-30b-a3b --layers 4 -o random-qwen3

The tokenizer, its small vocabulary and the prompts are those of a shipped model. The small vocabulary makes embeddings
small too, so that a few layers take the same share of the time as all layers of the published model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # Python puts the script's own folder there

from benchmarks.kernels.routing import MODELS

SHIPPED = Path(__file__).parents[1] / "models" / "stdlib-qwen3-moe"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "held_out.txt")

ATTENTION = {
    "qwen3-30b-a3b": ("qwen3_moe", {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}),
    "mixtral-8x7b": ("mixtral", {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}),
}
"""Architecture and published attention of each model; its experts are those of :data:`MODELS`."""


def config_of(name: str, layers: int) -> PreTrainedConfig:
    """Return the configuration of a published model with that many layers and the shipped vocabulary."""
    shape, (architecture, attention) = MODELS[name], ATTENTION[name]
    sizes: dict[str, int | None] = {
        "moe_intermediate_size": shape.intermediate,
        "num_experts": shape.experts,
        "norm_topk_prob": True,
    }
    if architecture == "mixtral":
        sizes = {"num_local_experts": shape.experts, "sliding_window": None}
    return AutoConfig.for_model(
        architecture,
        **attention,
        **sizes,
        vocab_size=AutoConfig.from_pretrained(SHIPPED).vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(ATTENTION))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(args.model, args.layers), dtype=torch.bfloat16)
    model.save_pretrained(args.output)
    for file in BESIDE:
        shutil.copy(SHIPPED / file, args.output)
    print(f"{args.output}: {sum(each.numel() for each in model.parameters()) / 1e9:.2f} B parameters")


if __name__ == "__main__":
    main()
