"""Damaged encoded sources: one line that names the file and the tensor, or the option, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from planner.model.codecs import FILES
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.architectures import build
from tests.conftest import Outcome, one_line
from tests.encoded.folder import edit_config, encode_folder
from tests.encoded.forms import FORMS, Form
from vllm_moeq.format import MoeqError, verify

Moeq = Callable[..., Outcome]

LINEAR = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    build("qwen3_moe", folder)
    return folder


@dataclass(frozen=True)
class Damage:
    """One of them.

    Attributes:
        form: the encoded form.
        suffix: the tensor that is changed; empty for none.
        change: what takes its place; None takes it away.
        message: a part of the error; with the name of the tensor, unless that is missing.
        add: further tensors of the same linear.
        elsewhere: name of the tensor that the error names instead.
    """

    form: str
    suffix: str
    change: Callable[[torch.Tensor], torch.Tensor] | None
    message: str
    add: Mapping[str, torch.Tensor] = field(default_factory=dict)
    elsewhere: str | None = None


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor.float(), float("nan")).to(tensor.dtype)


def first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1].contiguous()


def twice(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


def short(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :-1].contiguous()


HEADERS: dict[str, Damage] = {
    "fp8-scales": Damage("fp8-small-blocks", "weight_scale_inv", first, "per 32 × 64, found float32 [3, 2]"),
    "fp8-scale-dtype": Damage("fp8-small-blocks", "weight_scale_inv", torch.Tensor.int, "found int32 [4, 2]"),
    "fp8-no-scale": Damage("fp8-small-blocks", "weight_scale_inv", None, "in a way that cannot be read",
                           elsewhere="weight"),
    "fp8-sixteen-bits": Damage("fp8-small-blocks", "weight", torch.Tensor.bfloat16, "weight of 8 or 4 bits beside it, "
                               "found bfloat16", elsewhere="weight_scale_inv"),
    "fp8-two-scales": Damage("fp8-small-blocks", "weight_scale_inv", lambda it: it, "found both",
                             add={"weight_scale": torch.ones(4, 2)}, elsewhere="weight_scale"),
    "fp8-flat": Damage("fp8-small-blocks", "weight", torch.Tensor.flatten, "in two or three dimensions"),
    "fp4-scales": Damage("fp8-fp4-experts", "scale", short, "per 32 weights of a row"),
    "mxfp4-scale-dtype": Damage("ct-mxfp4", "weight_scale", torch.Tensor.float, "per 32 weights"),
    "nvfp4-whole": Damage("ct-nvfp4", "weight_global_scale", twice, "expected one float, found"),
    "nvfp4-no-whole": Damage("ct-nvfp4", "weight_global_scale", None, "per 32 weights", elsewhere="weight_scale"),
    "packed-dtype": Damage("ct-int4-groups", "weight_packed", torch.Tensor.long, "uint8 or int32, found int64"),
    "packed-scales": Damage("ct-int4-groups", "weight_scale", first, "per row or per group"),
    "packed-no-scale": Damage("ct-int4-groups", "weight_scale", None, "weight_scale beside it, found none",
                              elsewhere="weight_packed"),
    "packed-order": Damage("ct-int4-order", "weight_g_idx", first, "a group for each input"),
    "packed-no-order": Damage("ct-int4-order", "weight_g_idx", None, "weight_g_idx beside it",
                              elsewhere="weight_packed"),
    "packed-zeros": Damage("ct-int4-zeros", "weight_zero_point", first, "expected int32 [16, 4]"),
    "packed-no-zeros": Damage("ct-int4-zeros", "weight_zero_point", None, "weight_zero_point beside it",
                              elsewhere="weight_packed"),
    "int8-zeros": Damage("ct-int8-zeros", "weight_zero_point", torch.Tensor.int, "one for each scale"),
    "gptq-words": Damage("gptq-3", "qweight", first, "a whole number of codes of 3 bits"),
    "gptq-zeros": Damage("gptq-4", "qzeros", short, "of 2, 3, 4, 8 bits"),
    "gptq-scales": Damage("gptq-4", "scales", short, "floats [groups, 128]"),
    "gptq-order": Damage("gptq-4", "g_idx", short, "a group for each input of 4 bits"),
    "gptq-no-zeros": Damage("gptq-4", "qzeros", None, "qzeros beside it, found none", elsewhere="qweight"),
    "gptq-twice": Damage("gptq-4", "qweight", lambda it: it, "expected one tensor that holds",
                         add={"weight": torch.ones(128, 128).bfloat16()}),
    "awq-scales": Damage("awq", "scales", short, "where the number of groups divides 128 inputs"),
    "awq-zeros": Damage("awq", "qzeros", first, "expected int32 [4, 16]"),
    "awq-factor": Damage("modelopt-fp8", "", None, "which is not read", add={"pre_quant_scale": torch.ones(128)},
                         elsewhere="pre_quant_scale"),
}  # fmt: skip
"""What headers alone say."""

VALUES: dict[str, Damage] = {
    "fp8-scales": Damage("fp8-small-blocks", "weight_scale_inv", nan, "expected finite scales"),
    "fp8-values": Damage("fp8-small-blocks", "weight", nan, "NaN"),
    "exponents": Damage("fp8-bytes", "weight_scale_inv", lambda it: torch.full_like(it, 255), "expected finite scales"),
    "nvfp4-whole": Damage("ct-nvfp4", "weight_global_scale", torch.zeros_like, "expected finite scales"),
    "nvfp4-scales": Damage("modelopt-nvfp4", "weight_scale", nan, "expected finite scales"),
    "packed-scales": Damage("ct-int4-groups", "weight_scale", nan, "expected finite scales"),
    "packed-shape": Damage("ct-int4-groups", "weight_shape", lambda it: it * 2, "expected [128, 128], as the packed"),
    "packed-order": Damage("ct-int4-order", "weight_g_idx", lambda it: it + 1, "expected groups from 0 to 3"),
    "packed-uneven": Damage("ct-int4-order", "weight_g_idx", torch.zeros_like, "each of 4 groups 32 times"),
    "gptq-scales": Damage("gptq-4", "scales", nan, "expected finite scales"),
    "gptq-order": Damage("gptq-4", "g_idx", lambda it: it - 1, "expected groups from 0 to 3, found -1 to 2"),
    "gptq-zeros": Damage("gptq-4", "qzeros", lambda it: torch.full_like(it, -1), "zero points of 1 or more, found 0"),
    "awq-scales": Damage("awq", "scales", nan, "expected finite scales"),
}
"""What is found when the tensor is read."""


def one_of_each_layer(name: str, form: Form) -> Form | None:
    """Encode one matrix of each layer."""
    return form if name.endswith(".experts.2.up_proj.weight") else None


def damaged(dense: Path, folder: Path, damage: Damage) -> Path:
    """Write an encoded model with one damaged linear."""
    form = FORMS[damage.form]
    encode_folder(dense, folder, form, one_of_each_layer)
    tensors = load_file(folder / "model.safetensors")
    name = f"{LINEAR}.{damage.suffix}"
    if damage.change is not None:
        tensors[name] = damage.change(tensors[name])
    else:
        tensors.pop(name, None)
    tensors |= {f"{LINEAR}.{suffix}": tensor for suffix, tensor in damage.add.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_do_not_fit(name: str, dense: Path, tmp_path: Path) -> None:
    damage = HEADERS[name]
    folder = damaged(dense, tmp_path / "source", damage)
    with pytest.raises(MoeqError) as found, SourceModel(folder) as model:
        read_layout(model)
    message = str(found.value)
    assert "\n" not in message
    assert f"tensor {LINEAR}.{damage.elsewhere or damage.suffix}" in message
    assert damage.message in message


@pytest.mark.parametrize("name", VALUES)
def test_values_that_cannot_be_decoded(name: str, dense: Path, tmp_path: Path) -> None:
    damage = VALUES[name]
    with SourceModel(damaged(dense, tmp_path / "source", damage)) as model:
        read_layout(model)
        if damage.message == "NaN":
            assert bool(model.shards.load(f"{LINEAR}.weight").isnan().all())
            return
        with pytest.raises(MoeqError) as found:
            model.shards.load(f"{LINEAR}.weight")
        other = "model.layers.0.mlp.experts.2.up_proj.weight"
        assert bool(model.shards.load(other).isfinite().all())
    assert f"model.safetensors: tensor {LINEAR}.{damage.suffix}: expected" in str(found.value)
    assert damage.message in str(found.value)


TWO_NUMBERS = "expected two numbers up to"

SETTINGS: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "blocks-of-nothing": ("fp8-blocks", {"weight_block_size": [128, 0]}, f"weight_block_size: {TWO_NUMBERS}"),
    "blocks-of-text": ("fp8-blocks", {"weight_block_size": "128"}, f"weight_block_size: {TWO_NUMBERS}"),
    "one-number": ("fp8-blocks", {"weight_block_size": [128]}, f"weight_block_size: {TWO_NUMBERS}"),
    "structure": ("ct-fp8-rows", {"config_groups": {"g": {"weights": {"block_structure": [True, 64]}}}},
                  f"block_structure: {TWO_NUMBERS}"),
    "transforms": ("ct-int4-groups", {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
                   "transform_config: expected none, as the inputs would have to be transformed"),
    "widths": ("ct-int4-groups", {"config_groups": {"g": {"weights": {"num_bits": 3}}}},
               "config_groups: expected weights of 1, 2, 4 or 8 bits"),
    "gptq-format": ("gptq-4", {"checkpoint_format": "marlin"},
                    "checkpoint_format: expected gptq or gptq_v2, found 'marlin'"),
    "gptq-formats": ("gptq-4", {"checkpoint_format": "gptq", "format": "gptq_v2"}, "format: expected gptq or gptq_v2"),
    "gptq-words": ("gptq-4", {"pack_dtype": "int16"}, "pack_dtype: expected int32, found 'int16'"),
    "gptq-rotated": ("gptq-4", {"rotation": "hadamard"}, "rotation: expected none"),
    "awq-order": ("awq", {"version": "gemv"}, "version: expected gemm, found 'gemv'"),
    "no-method": ("awq", {"quant_method": None}, "quantization_config: quant_method: expected the name of a method"),
    "unknown-method": ("awq", {"quant_method": "aqlm"}, "quantized already (aqlm) in a way that is not read"),
}  # fmt: skip
"""Name → form, changes of the quantization_config, and the error."""


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_used(name: str, dense: Path, tmp_path: Path) -> None:
    form, changes, message = SETTINGS[name]
    folder = encode_folder(dense, tmp_path / "source", FORMS[form], one_of_each_layer)
    edit_config(folder, quantization_config={**FORMS[form].settings, **changes})
    with pytest.raises(MoeqError) as found, SourceModel(folder) as model:
        read_layout(model)
    assert str(found.value).startswith(f"{folder / 'config.json'}: ")
    assert message in str(found.value)


def test_settings_may_be_nested_or_beside_config_json(dense: Path, tmp_path: Path) -> None:
    """A wrapper has them in its language model's config; config.json counts before other files."""
    folder = encode_folder(dense, tmp_path / "source", FORMS["gptq-8-v2"], one_of_each_layer)
    with SourceModel(folder) as model:
        expected = model.shards.load(f"{LINEAR}.weight")
    settings = dict(FORMS["gptq-8-v2"].settings)
    edit_config(folder, quantization_config=None, text_config={"quantization_config": settings})
    (folder / "quantize_config.json").write_text("[]")
    with SourceModel(folder) as model:
        assert torch.equal(model.shards.load(f"{LINEAR}.weight"), expected)
    edit_config(folder, text_config=None)
    with pytest.raises(MoeqError, match=r"quantize_config\.json: expected an object, found \[\]"):
        SourceModel(folder)
    settings.pop("quant_method")
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    with SourceModel(folder) as model:
        assert torch.equal(model.shards.load(f"{LINEAR}.weight"), expected)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings_alone_encodes_nothing(name: str, dense: Path, tmp_path: Path) -> None:
    """Other tools write files of these names beside sixteen bits."""
    folder = Path(shutil.copytree(dense, tmp_path / "source"))
    (folder / name).write_text(json.dumps({"quant_method": "other", "quantization": {"quant_algo": None}}))
    with SourceModel(folder) as model, SourceModel(dense) as same:
        assert model.shards.tensors == same.shards.tensors
        assert read_layout(model) == read_layout(same)


def test_only_encoded_sources_have_scales_of_exponents(dense: Path, tmp_path: Path, quantized_copy: Path) -> None:
    folder = encode_folder(dense, tmp_path / "source", FORMS["fp8-exponents"])
    edit_config(folder, quantization_config=None)
    with pytest.raises(MoeqError, match="has unsupported dtype 'F8_E8M0'"):
        SourceModel(folder)
    shard = next(
        path for path in sorted(quantized_copy.glob("*.safetensors")) if "scale" in str(load_file(path).keys())
    )
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("scale"))
    tensors[name] = torch.ones(tensors[name].shape).to(torch.float8_e8m0fnu)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(MoeqError, match=rf"tensor {name} has unsupported dtype 'F8_E8M0'"):
        verify(quantized_copy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-order", "packed-shape", "fp8-values"])
def test_the_command_writes_nothing(name: str, dense: Path, tmp_path: Path, moeq: Moeq) -> None:
    folder = damaged(dense, tmp_path / "source", VALUES[name])
    error = one_line(moeq("quantize", folder, "--avg-bits", "2.5", "-o", tmp_path / "made"), "model.layers.0.")
    assert f"tensor {LINEAR}.weight" in error or f"tensor {LINEAR}.{VALUES[name].suffix}" in error
    assert VALUES[name].message in error
    assert not (tmp_path / "made").exists()
