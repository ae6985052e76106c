"""The model that all peers quantize: its expert matrices, and a copy of it with other values for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.peers.processes.job import PLACES
from benchmarks.peers.storage import GROUP
from planner.model.hub import companions
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.model.tensors import SourceTensors
from planner.output.files import write_json, write_tensors
from vllm_moeq.format import CheckpointError, UsageError

WEIGHTS = "model.safetensors"


def expert_names(model: SourceModel) -> Iterator[tuple[str, str]]:
    """Yield (``layer.expert.place``, the tensor's name in the model) of all expert matrices.

    Raises:
        UsageError: experts that are not stored as one tensor per matrix.
    """
    if isinstance(model.shards, SourceTensors) and model.shards.matrices:
        raise UsageError(f"{model.folder}: expected one plain tensor per expert matrix, found another layout")
    for layer in read_layout(model).layers:
        for expert in range(layer.num_experts):
            for place, projection in zip(PLACES, layer.projections.names(), strict=True):
                yield f"{layer.index}.{expert}.{place}", layer.weight(expert, projection)


def check_model(folder: Path) -> None:
    """Refuse a model whose experts are stored in another way, or whose rows are no whole number of groups.

    Raises:
        MoeqError: naming the matrices; a damaged model.
    """
    with SourceModel(folder) as model:
        for _, name in expert_names(model):
            columns = model.shards.info(name).shape[1]
            if columns % GROUP:  # the bits of the table would be wrong
                raise UsageError(f"{folder}: {name}: expected a multiple of {GROUP} inputs, found {columns}")


def write_experts(model: SourceModel, path: Path) -> None:
    """Write all expert matrices to a file, float32."""
    write_tensors(path, {key: model.shards.load(name).float().contiguous() for key, name in expert_names(model)})


def write_with(model: SourceModel, values: Path, output: Path) -> None:
    """Write a copy of the model, float32, whose experts have the values in a file.

    Raises:
        CheckpointError: the file lacks a matrix, or has one of another shape.
    """
    found, tensors = load_file(values), {}
    keys = {name: key for key, name in expert_names(model)}
    for name in model.shards.tensors:
        tensors[name] = model.shards.load(name).float().contiguous()
        key = keys.get(name)
        if key is None:
            continue
        if key not in found or found[key].shape != tensors[name].shape:
            shape = tuple(found[key].shape) if key in found else "nothing"
            raise CheckpointError(f"{values}: {key}: expected {tuple(tensors[name].shape)}, found {shape}")
        tensors[name] = found[key].to(torch.float32)
    output.mkdir()
    for name in companions(model.folder):
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(model.folder / name, output / name)
    write_tensors(output / WEIGHTS, tensors)
    write_json(output / "config.json", {**model.config, "dtype": "float32"})
