"""Tiny checkpoints with a layer for speculative decoding behind their last one, as the published models have it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.architectures import SIZES, build

LAYER = SIZES["num_hidden_layers"]
"""The index of the added layer."""

HIDDEN = SIZES["hidden_size"]

AGREEING = 0.02
"""What layers add to the residual, as a share of random layers' output: drafts agree with the model now and then."""


def build_with_mtp(name: str, folder: Path) -> Path:
    """Write the checkpoint of a row of ``TINY`` with such a layer, in the names of DeepSeek-V3 and GLM-4.5.

    Its drafts follow from the last token alone: what the layers add is small, and ``eh_proj`` takes the token's half.
    """
    build(name, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[key] = tensor * AGREEING
    start, added = f"model.layers.{LAYER - 1}.", f"model.layers.{LAYER}."
    generator = torch.Generator().manual_seed(1)
    for key in [key for key in tensors if key.startswith(start)]:
        tensor = tensors[key]
        order = torch.randperm(tensor.shape[0], generator=generator) if ".experts." in key else slice(None)
        tensors[added + key.removeprefix(start)] = tensor[order].clone()
    norm = tensors["model.norm.weight"]
    tensors[f"{added}eh_proj.weight"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1).to(norm.dtype)
    for leaf in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{added}{leaf}.weight"] = norm.clone()
    tensors[f"{added}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"{added}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return folder
