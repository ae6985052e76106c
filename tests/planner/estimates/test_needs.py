"""What a dry run announces against what the command then takes."""

from __future__ import annotations

import json
import math
import subprocess
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from planner.common.units import GIB
from planner.estimates import Service, serving_needs
from planner.estimates.serving import FIXED_BYTES, INPUT_BLOCK, ROW_TILE, growth_on_gpu
from planner.model.layout import Layout, read_layout
from planner.model.sizes import Sizes, Storage
from planner.model.source import SourceModel
from tests.kernels.layers import random_matrices
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MOEQ, QWEN
from tests.shipped import MIXTRAL_SIZES
from tests.tiers import thorough
from vllm_moeq.format import SCHEMES, UsageError
from vllm_moeq.kernels.triton.repack import repack

pytestmark = pytest.mark.slow

GPTQ = ("--data", CALIBRATION_TEXT, "--samples", "16", "--seq-len", "512", "--method", "router-norm-maxvar")
ESTIMATED = ("--data", CALIBRATION_TEXT, "--samples", "8", "--seq-len", "512", "--method", "kl-estimated")
SIZES = Sizes(source_bytes=0, expert_bytes=30 * GIB, linear_bytes=GIB, kept_bytes=GIB, largest_shard_bytes=GIB)


def announced(*arguments: object) -> dict[str, Any]:
    command = [MOEQ, *map(str, arguments), "--dry-run", "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def peak(*arguments: object) -> int:
    """Run the command; return the largest resident memory of its process, bytes."""
    process = subprocess.Popen([MOEQ, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # not of wait4: that counts what the process was before exec
                found = max(found, int(line.split()[1]) << 10)
        time.sleep(0.02)
    assert process.returncode == 0
    return found


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        pytest.param(MIXTRAL, ("--quantizer", "rtn"), id="mixtral-rtn"),
        pytest.param(QWEN, ("--quantizer", "rtn"), id="qwen-rtn", marks=pytest.mark.full),
        pytest.param(MIXTRAL, GPTQ, id="mixtral-gptq", marks=pytest.mark.full),
        pytest.param(QWEN, GPTQ, id="qwen-gptq", marks=pytest.mark.full),
    ],
)
def test_quantizing_takes_what_was_announced(model: Path, flags: tuple[object, ...], tmp_path: Path) -> None:
    arguments = ("quantize", model, "--avg-bits", "2.5", *flags, "-o", tmp_path / "out")
    needs = announced(*arguments)["needs"]
    assert not (tmp_path / "out").exists()
    measured = peak(*arguments)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert needs["written_bytes"] == pytest.approx(written, rel=0.05)
    assert needs["ram_bytes"] == pytest.approx(measured, rel=0.15)
    assert needs["seconds"] > 0


@pytest.mark.parametrize(
    "flags", [pytest.param((), id="weights"), pytest.param(ESTIMATED, id="text", marks=pytest.mark.full)]
)
def test_planning_takes_what_was_announced(flags: tuple[object, ...], tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    needs = announced("plan", MIXTRAL, *flags)["needs"]
    measured = peak("plan", MIXTRAL, *flags, "-o", output)
    assert needs["ram_bytes"] == pytest.approx(measured, rel=0.15)
    assert needs["written_bytes"] == pytest.approx(output.stat().st_size, rel=0.5)


@pytest.mark.parametrize("flags", thorough([(), ("--format", "f32")], [()]))
def test_exporting_takes_what_was_announced(flags: tuple[str, ...], quantized_mixtral: Path, tmp_path: Path) -> None:
    arguments = ("export", quantized_mixtral, *flags, "-o", tmp_path / "out")
    needs = announced(*arguments)["needs"]
    measured = peak(*arguments)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert needs["written_bytes"] == pytest.approx(written, rel=0.05)
    assert needs["ram_bytes"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    "more",
    [pytest.param((), id="alone", marks=pytest.mark.full), pytest.param(("--reference", MIXTRAL), id="reference")],
)
def test_evaluating_takes_what_was_announced(more: tuple[object, ...], tmp_path: Path) -> None:
    model = MIXTRAL
    arguments = ("eval", model, "--data", model / "held_out.txt", "--max-tokens", "6000", *more, "-o", tmp_path / "out")
    needs = announced(*arguments)["needs"]
    assert not (tmp_path / "out").exists()
    assert needs["ram_bytes"] == pytest.approx(peak(*arguments), rel=0.15)
    assert needs["seconds"] > 0


def test_comparing_takes_what_was_announced(tmp_path: Path) -> None:
    model, output = MIXTRAL, tmp_path / "out"
    wanted = (
        "--methods",
        "router-norm-maxvar,weight",
        "--avg-bits",
        "2,2.5",
        "--data",
        CALIBRATION_TEXT,
        "--samples",
        "4",
    )
    arguments = ("compare", model, "--held-out", model / "held_out.txt", "--max-tokens", "6000", *wanted, "-o", output)
    needs = announced(*arguments)["needs"]
    assert not output.exists()
    assert needs["ram_bytes"] == pytest.approx(peak(*arguments), rel=0.15)
    assert needs["written_bytes"] == pytest.approx(sum(path.stat().st_size for path in output.iterdir()), rel=0.5)


@pytest.fixture
def layout() -> Layout:
    """Four layers whose experts fill the blocks of the fused kernel."""
    with SourceModel(MIXTRAL) as model:
        found = read_layout(model)
    return with_shapes(found, {"w1": (4096, 4096), "w3": (4096, 4096), "w2": (4096, 4096)})


def with_shapes(layout: Layout, shapes: dict[str, tuple[int, int]]) -> Layout:
    return replace(layout, layers=tuple(replace(layer, shapes=shapes) for layer in layout.layers))


def test_experts_grow_on_gpus_to_whole_blocks(layout: Layout) -> None:
    """Qwen3-30B-A3B: down has 768 inputs, 192 on each of four ranks, which take a block of 256."""
    assert growth_on_gpu(layout) == growth_on_gpu(layout, 4) == 1
    wide = with_shapes(layout, {"w1": (768, 2048), "w3": (768, 2048), "w2": (2048, 768)})
    assert growth_on_gpu(wide) == 1
    assert growth_on_gpu(wide, 4) == Fraction(2 * 3 + 4, 9)
    odd = with_shapes(layout, {"w1": (1408, 2048), "w3": (1408, 2048), "w2": (2048, 1408)})
    assert growth_on_gpu(odd) == Fraction(2 * 1408 + 1536, 3 * 1408)
    needs = serving_needs(MIXTRAL_8X7B, odd, SIZES, Service(context=1, concurrency=1))
    assert needs.weight_bytes == math.ceil(30 * GIB * growth_on_gpu(odd)) + 2 * GIB


def test_experts_that_cannot_be_cut_stay_whole(layout: Layout) -> None:
    """A rotated trellis keeps blocks of 128: of Qwen3-30B-A3B's 768 neurons four ranks would get 192 each."""
    wide = with_shapes(layout, {"w1": (768, 2048), "w3": (768, 2048), "w2": (2048, 768)})
    rotated = Storage(SCHEMES["trellis"], rotated=True)
    service = Service(context=100, concurrency=1, gpu_gib=14)
    cut = serving_needs(MIXTRAL_8X7B, wide, SIZES, service)
    whole = serving_needs(MIXTRAL_8X7B, wide, SIZES, service, rotated)
    assert (cut.flags, cut.expert_parallel) == ("--tensor-parallel-size 4", False)
    assert (whole.flags, whole.gpus) == ("--tensor-parallel-size 4 --enable-expert-parallel", 4)
    assert cut.weight_bytes - whole.weight_bytes == math.ceil(30 * GIB * Fraction(2 * 3 + 4, 9) / 4) - 30 * GIB // 4
    two = serving_needs(MIXTRAL_8X7B, wide, SIZES, replace(service, gpu_gib=24), rotated)
    assert two.flags == "--tensor-parallel-size 2"


def test_blocks_are_those_of_the_fused_kernel() -> None:
    """A gate and an up of 48 rows fill a tile of 64 twice over, 320 inputs two blocks."""
    words = repack(random_matrices([2], 2 * 48, 320, 32), gated=True).words
    assert words.numel() * 16 == 2 * (2 * ROW_TILE) * (2 * INPUT_BLOCK)


LAYERS = MIXTRAL_SIZES.layers
MIXTRAL_8X7B = {
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096
}  # fmt: skip


def test_the_cache_holds_keys_and_values_of_every_layer(layout: Layout) -> None:
    found = serving_needs(MIXTRAL_8X7B, layout, SIZES, Service(context=1000, concurrency=3, gpu_gib=80))
    assert found.gpus == 1
    assert found.cache_bytes == 3 * 1000 * LAYERS * (2 * 8 * 128) * 2
    assert found.gpu_bytes == found.cache_bytes + SIZES.total_bytes + FIXED_BYTES


def test_a_latent_cache_is_on_every_rank(layout: Layout) -> None:
    config = {**MIXTRAL_8X7B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    found = serving_needs(config, layout, SIZES, Service(context=1000, concurrency=3, gpu_gib=24))
    assert found.gpus == 2
    assert found.cache_bytes == 3 * 1000 * LAYERS * 576 * 2
    assert found.weight_bytes == SIZES.total_bytes // 2


def test_windows_and_linear_attention_hold_less(layout: Layout) -> None:
    kinds = ["full_attention", "sliding_attention", "linear_attention", "sliding_attention"]
    config = {**MIXTRAL_8X7B, "layer_types": kinds, "sliding_window": 128}
    found = serving_needs(config, layout, SIZES, Service(context=1000, concurrency=1, gpu_gib=80))
    assert found.cache_bytes == (1000 + 2 * 128) * (2 * 8 * 128) * 2


@pytest.mark.parametrize(
    "said",
    [
        {"layer_types": ["mamba", "attention", "conv", "moe"]},
        {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
        {"hybrid_override_pattern": "M*-E"},
        {"linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1, 3, 4]}},
        {"attn_layer_period": 8, "attn_layer_offset": 1},
    ],
)
def test_layers_without_attention_cache_nothing(layout: Layout, said: dict[str, Any]) -> None:
    """The forms of Granite and LFM2, Nemotron-H, its published files, Kimi Linear's, and Jamba's."""
    config = {**MIXTRAL_8X7B, **said}
    found = serving_needs(config, layout, SIZES, Service(context=1000, concurrency=1, gpu_gib=80))
    assert found.cache_bytes == 1000 * (2 * 8 * 128) * 2


def test_every_other_layer_may_be_a_full_one_without_a_list(layout: Layout) -> None:
    """Published configs of Qwen3-Next say so by an interval."""
    config = {**MIXTRAL_8X7B, "full_attention_interval": 2}
    found = serving_needs(config, layout, SIZES, Service(context=1000, concurrency=1, gpu_gib=80))
    assert found.cache_bytes == LAYERS // 2 * 1000 * (2 * 8 * 128) * 2


@pytest.mark.parametrize(("gib", "gpus"), [(80, 1), (24, 2), (16, 4), (2, None)])
def test_as_few_gpus_as_hold_it(layout: Layout, gib: float, gpus: int | None) -> None:
    found = serving_needs(MIXTRAL_8X7B, layout, SIZES, Service(context=8192, concurrency=1, gpu_gib=gib))
    assert found.gpus == gpus
    if gpus is not None:
        assert found.gpu_bytes <= 0.9 * gib * GIB


def test_heads_that_do_not_split_bound_the_ranks(layout: Layout) -> None:
    config = {**MIXTRAL_8X7B, "num_attention_heads": 6}
    assert serving_needs(config, layout, SIZES, Service(context=100, gpu_gib=24)).gpus == 2
    assert (
        serving_needs(config, layout, replace(SIZES, expert_bytes=60 * GIB), Service(context=100, gpu_gib=24)).gpus
        is None
    )


@pytest.mark.parametrize("gib", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_gpus_are_refused(gib: float) -> None:
    with pytest.raises(UsageError, match="--gpu-gib"):
        Service(gpu_gib=gib)
