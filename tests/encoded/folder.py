"""Folders whose linears are stored in one of the encoded forms, and the same models in bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from planner.model.source import SourceModel
from tests.encoded.forms import Form

SIZE = 128
"""Linears whose sizes are multiples of this are encoded; the others stay in bfloat16, as publishers leave some."""

Chooses = Callable[[str, Form], Form | None]


def _all_of_one(_: str, form: Form) -> Form:
    return form


def encode_folder(source: Path, folder: Path, form: Form, choose: Chooses = _all_of_one, size: int = SIZE) -> Path:
    """Write a model with encoded linears, in one shard.

    Args:
        source: the model.
        folder: the folder to write.
        form: the form that config.json says.
        choose: returns the form of a linear by its name, or None where it stays as it is.
        size: divides the sizes of all linears that are encoded.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        linear = "layers." in name and tensor.ndim == 2 and name.endswith(".weight") and "gate.weight" not in name
        own = choose(name, form) if linear and not any(length % size for length in tensor.shape) else None
        if own is None:
            tensors[name] = tensor
        else:
            base = name.removesuffix("weight")
            tensors |= {f"{base}{suffix}": value for suffix, value in own.encode(tensor.float()).items()}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads(json.dumps(form.settings, default=str))
    edit_config(folder, quantization_config=settings if form.file is None else None)
    if form.file is not None:
        (folder / form.file).write_text(json.dumps(settings))
    return folder


def decode_folder(encoded: Path, folder: Path, form: Form) -> Path:
    """Write the model of an encoded folder in bfloat16."""
    shutil.copytree(
        encoded, folder, ignore=shutil.ignore_patterns("*.safetensors", *([form.file] if form.file else []))
    )
    with SourceModel(encoded) as model:
        tensors = {name: model.shards.load(name).clone() for name in model.shards.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=None)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config.json; None takes a key away."""
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
