"""Linears of several widths, from the settings to the checkpoint and everything that shows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.progress import Progress
from planner.estimates.exchange import export_needs
from planner.exchange.autogptq import export_gptq, import_gptq
from planner.model.layout import read_layout
from planner.model.quantized import DequantizedModel
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantize_linear
from planner.quantization.settings import QuantizeSettings, check_sizes
from planner.reporting.card import card
from planner.reporting.command_lines import quantize_line
from planner.reporting.facts import collect
from tests.by_hand import in_turn, quantize_by_hand
from tests.conftest import WIDTHS
from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import GRID, Linear, MoeqError, ShardSet, UsageError, linear_values, load_config
from vllm_moeq.format.linears import SCALES, WORDS

pytestmark = pytest.mark.slow

QUIET = Progress(quiet=True)
ATTENTION = "model.layers.0.self_attn"

Moeq = Callable[..., Any]


@pytest.fixture(scope="module")
def chosen(tiny_mixtral: Path) -> dict[str, int]:
    with SourceModel(tiny_mixtral) as model:
        return in_turn(read_layout(model).linears)


@pytest.fixture(scope="module")
def mixed(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral with linears of 4, 8 and 16 bits; not to be changed."""
    output = tmp_path_factory.mktemp("mixed") / "mixtral"
    return quantize_by_hand(tiny_mixtral, output, lambda _: WIDTHS, quantizer="rtn", mixed_linears=True)


def test_every_linear_has_the_width_that_was_chosen(mixed: Path, chosen: dict[str, int], tiny_mixtral: Path) -> None:
    assert set(chosen.values()) == {4, 8, 16}
    with ShardSet(mixed) as shards, SourceModel(tiny_mixtral) as source, DequantizedModel(mixed) as read:
        for name, bits in chosen.items():
            weight = source.shards.load(f"{name}.weight")
            if bits == 16:
                assert torch.equal(shards.load(f"{name}.weight"), weight)
                continue
            packed = quantize_linear(weight, load_config(mixed).linear.of_width(bits))
            assert all(torch.equal(shards.load(f"{name}.{suffix}"), value) for suffix, value in packed.items())
            values = linear_values(packed[WORDS], packed[SCALES], bits)
            assert torch.equal(read.shards.load(f"{name}.weight"), values)


def test_the_config_names_what_differs(mixed: Path, chosen: dict[str, int]) -> None:
    config = load_config(mixed)
    assert (config.format_version, config.linear.bits) == (2, 4)
    assert config.linear.widths == {name: 8 for name, bits in chosen.items() if bits == 8}
    assert {name for name in config.unquantized if name in chosen} == {
        name for name, bits in chosen.items() if bits == 16
    }


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_one_width_for_all_is_version_1(bits: int, chosen: dict[str, int]) -> None:
    """However the settings say it."""
    linear = Linear.model_validate({"bits": {4: 8, 8: 16, 16: 4}[bits], "widths": dict.fromkeys(chosen, bits)})
    stored = linear.stored(chosen)
    assert (stored.bits, stored.widths) == (bits, {})


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (
            {"model.layers.9.self_attn.o_proj": 8},
            "model.layers.9.self_attn.o_proj: expected one of the model's linears",
        ),
        ({f"{ATTENTION}.k_proj": 8}, "as vLLM joins them"),
        ({f"{ATTENTION}.q_proj": 16}, "as vLLM joins them"),
    ],
)
def test_widths_that_do_not_fit_the_model_are_refused(widths: dict[str, int], message: str, tiny_mixtral: Path) -> None:
    linear = Linear.model_validate({"bits": 4, "group_size": 32, "widths": widths})
    with SourceModel(tiny_mixtral) as model, pytest.raises(UsageError, match=message):
        check_sizes(model, read_layout(model), QuantizeSettings(group_size=32, linear=linear), [GRID])


LIES: dict[str, Callable[[dict[str, int]], dict[str, int]]] = {
    "4 where 8 are stored": lambda _: {},
    "8 where 4 are stored": lambda widths: {**widths, "model.layers.1.self_attn.o_proj": 8},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_width_that_is_not_the_files_is_refused(
    lie: str, mixed: Path, change_config: Callable[..., None], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        linear, found = config["quantization_config"]["linear"], LIES[lie](dict(stored.widths))
        config["quantization_config"].update(
            format_version=2 if found else 1,
            linear={**{key: linear[key] for key in ("bits", "group_size")}, **({"widths": found} if found else {})},
        )

    stored, folder = load_config(mixed).linear, Path(shutil.copytree(mixed, tmp_path / "copy"))
    change_config(folder, change)
    with pytest.raises(MoeqError, match=rf"self_attn\.o_proj\.weight_packed: .* words do not fit {lie[0]} bits"):
        verify_whole(folder)


def test_verify_counts_them(mixed: Path, moeq: Moeq) -> None:
    outcome = moeq("verify", mixed)
    assert outcome.code == 0
    assert "linears 4 × 4 bit, 1 × 8 bit" in " ".join(outcome.out.split())


def test_the_report_names_every_width(mixed: Path) -> None:
    facts = collect(mixed)
    assert [part.title for part in facts.sizes.parts if "linears" in part.title] == [
        "other linears, 4 bits", "other linears, 8 bits"
    ]  # fmt: skip
    assert sum(part.bytes for part in facts.sizes.parts) == sum(
        info.nbytes for info in ShardSet(mixed).tensors.values()
    )
    assert "other linears have 4 or 8 bits" in card(facts)
    assert "--linear-bits auto" in quantize_line(facts, "out")


def test_gptqs_format_keeps_them(tiny_mixtral: Path, integer_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    ours = integer_checkpoint(tiny_mixtral, "rtn", 4, 32, mixed_linears=True)
    export_gptq(ours, tmp_path / "gptq", "v2", QUIET)
    import_gptq(tmp_path / "gptq", tmp_path / "back", QUIET)
    found, expected = load_config(tmp_path / "back"), load_config(ours)
    assert (found.linear, found.format_version) == (expected.linear, 2)
    with ShardSet(ours) as one, ShardSet(tmp_path / "back") as other:
        for name in one.tensors:
            assert torch.equal(one.load(name), other.load(name)), name


def test_a_dense_export_takes_what_is_estimated(mixed: Path, tiny_mixtral: Path) -> None:
    dense = export_needs(mixed, 2).written_bytes
    source = sum(path.stat().st_size for path in tiny_mixtral.glob("*.safetensors"))
    assert dense == pytest.approx(source, rel=0.1)
