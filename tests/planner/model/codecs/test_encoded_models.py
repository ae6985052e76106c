"""Whole models in every encoding: what is made of them is what is made of the same model in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.coverage import quantize
from benchmarks.models import families
from planner.model.codecs import FILES
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.architectures import build
from tests.conftest import Outcome
from tests.encoded.folder import decode_folder, edit_config, encode_folder
from tests.encoded.forms import EXPONENT, FORMS, Form, fp8_blocks
from tests.paths import CALIBRATION_TEXT
from tests.tiers import thorough

Moeq = Callable[..., Outcome]

EVERY_RUN = ("fp8-fp4-experts", "modelopt-nvfp4", "ct-int4-zeros", "ct-int8", "gptq-4-order", "awq")
"""One of each codec; the others are compared with other libraries by their tensors."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE whose linears are multiples of 128, but one."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    build("qwen3_moe", folder)
    return folder


def made_of(folder: Path) -> tuple[object, dict[str, bytes]]:
    """Return config.json and the shards; nothing may be there that a reader could take instead."""
    assert not any((folder / name).exists() for name in FILES)
    shards = {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" in path.name}
    return json.loads((folder / "config.json").read_text()), shards


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough(FORMS, EVERY_RUN))
def test_quantized_is_what_is_made_of_bfloat16(name: str, dense: Path, tmp_path: Path, moeq: Moeq) -> None:
    """Byte by byte, since both are read as the same bfloat16."""
    encoded = encode_folder(dense, tmp_path / "encoded", FORMS[name])
    twin = decode_folder(encoded, tmp_path / "twin", FORMS[name])
    assert (encoded / "model.safetensors").stat().st_size < 0.8 * (twin / "model.safetensors").stat().st_size
    for folder in (encoded, twin):
        made = moeq("quantize", folder, "--avg-bits", "2.5", "--bits", "2,3", "-o", f"{folder}-q")
        assert made.code == 0, made.err
    assert made_of(tmp_path / "encoded-q") == made_of(tmp_path / "twin-q")
    with SourceModel(encoded) as model:
        assert model.stored_bytes < (encoded / "model.safetensors").stat().st_size
        assert model.stored_bytes > 0.9 * (encoded / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_every_command_reads_an_encoded_source(dense: Path, tmp_path: Path, moeq: Moeq) -> None:
    """A text too, layer by layer, and sizes of a dry run; GPTQ's import still takes the codes as they are."""
    encoded = encode_folder(dense, tmp_path / "encoded", FORMS["gptq-4"])
    twin = decode_folder(encoded, tmp_path / "twin", FORMS["gptq-4"])
    text = ("--data", CALIBRATION_TEXT)
    for command in (
        ("eval", *text, "--max-tokens", 256, "--window", 64, "--json"),
        ("plan", "--avg-bits", "2.5", "--method", "kl", *text, "--samples", 2, "--seq-len", 64, "--json"),
        ("quantize", "--avg-bits", "2.5", "--dry-run", "--json", "-o", tmp_path / "nothing"),
        ("inspect", "--json"),
    ):
        found = [moeq(command[0], folder, *command[1:]) for folder in (encoded, twin)]
        assert [it.code for it in found] == [0, 0], found
        ours, theirs = (json.loads(it.out) for it in found)
        for key in ("perplexity", "achieved_avg_bits", "experts", "layers"):
            assert ours.get(key) == theirs.get(key), (command, key)


@pytest.mark.slow
def test_a_wrapper_has_its_settings_inside(tmp_path: Path) -> None:
    """As Kimi K2.5 is published: only experts are packed, and the language model's config says so."""
    families.build("kimi_k25", tmp_path / "model")
    form = FORMS["ct-int4-groups"]

    def experts(name: str, form: Form) -> Form | None:
        return form if ".mlp.experts." in name else None

    encoded = encode_folder(tmp_path / "model", tmp_path / "encoded", form, experts, size=32)
    config = json.loads((encoded / "config.json").read_text())
    inside = {**config["text_config"], "quantization_config": config["quantization_config"]}
    edit_config(encoded, quantization_config=None, text_config=inside)
    said: list[str] = []
    assert quantize(encoded, tmp_path / "out", said) == "yes", said
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    twin = decode_folder(encoded, tmp_path / "twin", form)
    assert quantize(twin, tmp_path / "twin-out", said) == "yes"
    assert made_of(tmp_path / "out")[1] == made_of(tmp_path / "twin-out")[1]


@pytest.mark.slow
def test_experts_may_have_another_form_than_attention(tmp_path: Path) -> None:
    """As DeepSeek-V4 is published: four-bit floats for experts, eight bits elsewhere, powers of two as scales."""
    families.build("deepseek_v4", tmp_path / "model")
    attention = Form({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8_blocks(16, 16, "scale", EXPONENT))

    def choose(name: str, form: Form) -> Form:
        return FORMS["fp8-fp4-experts"] if ".ffn.experts." in name else form

    encoded = encode_folder(tmp_path / "model", tmp_path / "encoded", attention, choose, size=16)
    stored = load_file(encoded / "model.safetensors")
    assert {stored["layers.1.ffn.experts.3.w1.weight"].dtype, stored["layers.1.attn.wq_a.weight"].dtype} == {
        torch.int8, torch.float8_e4m3fn,
    }  # fmt: skip
    said: list[str] = []
    assert quantize(encoded, tmp_path / "out", said) == "yes", said
    twin = decode_folder(encoded, tmp_path / "twin", attention)
    assert quantize(twin, tmp_path / "twin-out", said) == "yes"
    assert made_of(tmp_path / "out") == made_of(tmp_path / "twin-out")


def test_stacks_of_experts_have_scales_of_their_own(dense: Path, tmp_path: Path) -> None:
    """As transformers saves float8 in its own layout: a tensor per layer and projection, gate above up."""
    tensors = load_file(dense / "model.safetensors")
    stacked: dict[str, torch.Tensor] = {}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: torch.stack([tensors.pop(f"{block}.{expert}.{name}.weight") for expert in range(8)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        fused = {
            "gate_up_proj": torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1),
            "down_proj": parts["down_proj"],
        }
        for name, values in fused.items():
            stored = [FORMS["fp8-exponents"].encode(one.float()) for one in values]
            stacked[f"{block}.{name}"] = torch.stack([it["weight"] for it in stored])
            stacked[f"{block}.{name}_scale_inv"] = torch.stack([it["scale"] for it in stored])
    folder = tmp_path / "stacked"
    folder.mkdir()
    (folder / "config.json").write_text((dense / "config.json").read_text())
    edit_config(folder, quantization_config=FORMS["fp8-exponents"].settings)
    save_file({**tensors, **stacked}, folder / "model.safetensors")
    with SourceModel(folder) as model:
        assert len(read_layout(model).layers) == 2
        for expert in (0, 7):
            for place, projection in enumerate(("gate_proj", "up_proj")):
                found = model.shards.load(f"model.layers.1.mlp.experts.{expert}.{projection}.weight")
                whole = stacked["model.layers.1.mlp.experts.gate_up_proj"][expert].float()
                scales = stacked["model.layers.1.mlp.experts.gate_up_proj_scale_inv"][expert].float()
                expected = whole[place * 128 : place * 128 + 128] * scales[place]
                assert torch.equal(found, expected.bfloat16())
        assert stacked["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].dtype is EXPONENT


def test_transposed_stacks_share_a_scale(tmp_path: Path) -> None:
    """Llama-4's experts are stored transposed; one scale is for all, or one for each expert's output."""
    folder = tmp_path / "llama4"
    build("llama4_text", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "experts." in name and name.endswith("_proj")]:
        one = "down" in name
        scales = tensors[name].float().abs().amax(dim=(0, 1, 2) if one else (1,), keepdim=not one) / 448
        tensors[name] = (tensors[name].float() / scales).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scales
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    with SourceModel(folder) as model:
        for projection, part in (("down", "down_proj"), ("gate", "gate_up_proj"), ("up", "gate_up_proj")):
            stored = next(name for name in tensors if name.endswith(f"1.feed_forward.experts.{part}"))
            whole = (tensors[stored].float() * tensors[f"{stored}_scale"])[3].mT
            expected = whole if projection == "down" else whole.chunk(2)[projection == "up"]
            prefix = stored.removesuffix(f".{part}")
            found = model.shards.load(f"{prefix}.3.{projection}_proj.weight")
            assert torch.equal(found, expected.bfloat16())
