"""Schemes and the rotation in a configuration, and the signs beside it in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.by_hand import quantize_by_hand
from tests.format.test_schema import PREFIX, VALID, refusal
from vllm_moeq.format import SIGNS, CheckpointError, ShardSet, expert_matrices, load_config, parse_config, verify

TRELLISES = ["trellis", "grid", "trellis", "trellis"]
ROTATION = {"input": 128, "inner": 64}


def second(**more: Any) -> dict[str, Any]:
    return {**VALID, "format_version": 2, **more}


@pytest.mark.parametrize("more", [{"schemes": {PREFIX: TRELLISES}}, {"rotation": ROTATION}])
def test_either_needs_version_two(more: dict[str, Any]) -> None:
    config = parse_config(second(**more), "x")
    assert parse_config(json.loads(config.model_dump_json(exclude_none=True)), "x") == config
    assert "format_version: expected 2" in refusal({**VALID, **more})
    assert "format_version: expected 1" in refusal(second())


def test_each_expert_has_its_scheme() -> None:
    config = parse_config(second(schemes={PREFIX: TRELLISES}), "x")
    assert [config.scheme(PREFIX, expert).name for expert in range(4)] == TRELLISES
    assert parse_config(VALID, "x").scheme(PREFIX, 0).name == "grid"


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({}, "expected a layer, found none"),
        ({"elsewhere": TRELLISES}, "elsewhere is not among experts"),
        ({PREFIX: TRELLISES[:3]}, "expected 4 names, found 3"),
        ({PREFIX: [*TRELLISES[:3], "hexagon"]}, "expert 3: expected grid or trellis, found 'hexagon'"),
        ({PREFIX: ["grid"] * 4}, "expected another scheme than grid, found only that"),
        ({PREFIX: [1, 2, 3, 4]}, "valid string"),
        ({PREFIX: "trellis"}, "valid list"),
        ([], "valid dictionary"),
    ],
)
def test_other_schemes_are_refused(schemes: object, message: str) -> None:
    assert message in refusal(second(schemes=schemes))


def test_a_width_that_the_scheme_lacks_is_refused() -> None:
    config = second(schemes={PREFIX: TRELLISES}, experts={PREFIX: [8, 2, 3, 3]})
    config["plan"] = {**VALID["plan"], "bit_choices": [2, 3, 8]}
    assert "expert 0: expected one of 1, 2, 3, 4 bits for trellis, found 8" in refusal(config)


@pytest.mark.parametrize("rotation", [{}, {"input": 128}, {"input": 100, "inner": 64}, {"input": 8, "inner": 8}, 128])
def test_other_rotations_are_refused(rotation: object) -> None:
    assert "rotation" in refusal(second(rotation=rotation))


@pytest.fixture(scope="module")
def whole(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version_two") / "quantized"
    return quantize_by_hand(
        tiny_mixtral, folder, lambda layer: [8, 2, 3, 1] * (layer.num_experts // 4), scheme="trellis"
    )


def edited(whole: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor], str], None]) -> Path:
    """Copy a checkpoint; change the tensors of the shard that has the first layer's signs."""
    folder.mkdir()
    first = load_config(whole).signs()[0]
    for path in whole.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if first in tensors:
                edit(tensors, first)
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    present = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    index["weight_map"] = present
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def nothing(*_: Any) -> None:
    """Leave the tensors as they are."""


def test_what_is_written_is_valid(whole: Path) -> None:
    config = load_config(whole)
    assert len(config.signs()) == 2 * len(config.experts)
    files = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert 0 < files - verify(whole).total_bytes < 100_000  # headers


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), f"{SIGNS} is missing"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1]}), "expected torch.int32"),
        (lambda tensors, name: tensors.update({name: tensors[name].float()}), "expected torch.int32"),
        (
            lambda tensors, name: tensors.update({name.replace("experts.0.", "experts.1."): tensors[name].clone()}),
            "belongs to no expert",
        ),
    ],
    ids=["missing", "short", "float", "of another expert"],
)
def test_signs_that_do_not_fit_are_refused(
    whole: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor], str], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        verify(edited(whole, tmp_path / "edited", edit))


def test_signs_are_checked_before_a_matrix_is_handed_out(whole: Path, tmp_path: Path) -> None:
    """Readers take matrices one by one, and turn each back by its signs at once."""
    folder = edited(whole, tmp_path / "edited", lambda tensors, name: tensors.update({name: tensors[name].float()}))
    with ShardSet(folder) as shards, pytest.raises(CheckpointError, match="expected torch"):
        next(expert_matrices(shards, load_config(folder)))


def test_signs_without_a_rotation_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = edited(whole, tmp_path / "edited", nothing)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["rotation"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="belongs to no expert"):
        verify(folder)
