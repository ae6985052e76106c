"""Sizes from config.json alone: the checkpoint's own, and Table 1 of the paper."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.common.units import GIB
from planner.estimates.paper_formula import count_weights
from planner.model.layout import read_layout
from planner.model.skeleton import ConfigModel
from planner.model.source import SourceModel
from tests.conftest import one_line
from tests.paths import MODELS, QWEN, SHIPPED
from vllm_moeq.format import CheckpointError

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
LARGER = {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56}
CONFIGS = {"8x7b": MIXTRAL, "8x22b": MIXTRAL | LARGER}

PUBLISHED = {
    "8x7b": {
        "3": 19.3, "2.75": 17.7, "2.625": 16.9, "2.5": 16.1, "2.375": 15.3, "2.25": 14.5, "2.125": 13.8, "2": 13.1,
        "1.75": 11.7,
    },
    "8x22b": {"3": 57.5, "2.5": 46.7, "2.25": 43.0, "2": 38.6, "1.75": 35.2},
}  # fmt: skip
"""Table 1 of the paper: average → "GB", which are GiB. Its uniform 2 and its mixed 2.0 are the same number."""

FITS = [("8x7b", average) for average in ("3", "2.75", "2.625", "2.5", "2.375", "2.25", "2.125", "1.75")]
FITS += [("8x22b", "3"), ("8x22b", "2")]
"""Rows that the formula explains, with two widths: the average's neighbours."""

MISSES = {("8x7b", "2"): -0.13, ("8x22b", "2.5"): 1.37, ("8x22b", "2.25"): 0.34, ("8x22b", "1.75"): -0.53}
"""Rows that it does not → formula − published."""

ROUNDING = 0.05

Moeq = Callable[..., Any]


def neighbours(average: str) -> str:
    """Return the two widths that an average lies between."""
    return "2,3" if float(average) >= 2 else "1,2"


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """config.json of both models of the paper, and those of the shipped models."""
    root = tmp_path_factory.mktemp("configs")
    copies = {name: json.loads((MODELS / name / "config.json").read_text()) for name in SHIPPED}
    return {name: write_config(root / name, config) for name, config in (CONFIGS | copies).items()}


@pytest.fixture
def dry(moeq: Moeq) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a dry run and returns its JSON."""

    def run(model: Path, *flags: object) -> dict[str, Any]:
        outcome = moeq("plan", model, "--dry-run", "--json", *flags)
        assert outcome.code == 0, outcome.err
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    return run


class TestTensors:
    """Names, shapes and dtypes are those of the checkpoint that the config belongs to."""

    @pytest.mark.parametrize("name", SHIPPED)
    def test_of_the_shipped_models(self, folders: dict[str, Path], name: str) -> None:
        self.compare(folders[name], MODELS / name)

    @pytest.mark.parametrize(
        "change",
        [
            {"tie_word_embeddings": True},
            {"attention_bias": True},
            {"num_hidden_layers": 4, "decoder_sparse_step": 2},
            {"mlp_only_layers": [0], "head_dim": 48},
        ],
    )
    def test_of_variants(self, tmp_path: Path, change: dict[str, Any]) -> None:
        """Tied embeddings, biases, dense layers between the others."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(QWEN, **change)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
        alone = write_config(tmp_path / "alone", json.loads((tmp_path / "saved" / "config.json").read_text()))
        self.compare(alone, tmp_path / "saved")

    @staticmethod
    def compare(alone: Path, checkpoint: Path) -> None:
        with ConfigModel(alone) as model, SourceModel(checkpoint) as source:
            expected = {name: (info.shape, info.dtype) for name, info in source.shards.tensors.items()}
            assert {name: (info.shape, info.dtype) for name, info in model.shards.tensors.items()} == expected
            assert read_layout(model) == read_layout(source)

    def test_values_are_not_there(self, folders: dict[str, Path]) -> None:
        with ConfigModel(folders["8x7b"]) as model:
            for read in (model.shards.load, model.shards.map):
                with pytest.raises(CheckpointError, match=r"expected weights, found config\.json alone"):
                    read("lm_head.weight")

    def test_the_fingerprint_depends_on_the_config(self, folders: dict[str, Path]) -> None:
        assert len({ConfigModel(folders[name]).fingerprint() for name in folders}) == len(folders)


class TestCounts:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_of_both_mixtrals(self, folders: dict[str, Path], name: str) -> None:
        config = CONFIGS[name]
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        with ConfigModel(folders[name]) as model:
            counts = count_weights(model, read_layout(model))
        assert counts.experts == layers * 8 * 3 * hidden * inner
        assert counts.linears == layers * (2 * hidden * hidden + 2 * hidden * 8 * 128)
        assert counts.embeddings == 2 * 32000 * hidden
        assert counts.rest == layers * (8 * hidden + 2 * hidden) + hidden

    @pytest.mark.parametrize(("name", "billions"), [("8x7b", 46.7), ("8x22b", 140.6)])
    def test_totals_are_the_published_ones(self, folders: dict[str, Path], name: str, billions: float) -> None:
        with ConfigModel(folders[name]) as model:
            assert round(count_weights(model, read_layout(model)).total / 1e9, 1) == billions

    def test_the_larger_model_takes_no_time(self, folders: dict[str, Path]) -> None:
        began = time.monotonic()
        with ConfigModel(folders["8x22b"]) as model:
            read_layout(model)
        assert time.monotonic() - began < 10


class TestPaper:
    @pytest.mark.parametrize(("name", "average"), FITS)
    def test_rows_of_table_1_that_fit(self, dry: Any, folders: dict[str, Path], name: str, average: str) -> None:
        found = dry(folders[name], "--avg-bits", average, "--bits", neighbours(average))
        assert found["achieved_avg_bits"] == float(average)
        assert found["gib"]["paper"] == pytest.approx(PUBLISHED[name][average], abs=ROUNDING)

    @pytest.mark.parametrize(("row", "difference"), MISSES.items())
    def test_rows_of_table_1_that_do_not(
        self, dry: Any, folders: dict[str, Path], row: tuple[str, str], difference: float
    ) -> None:
        name, average = row
        found = dry(folders[name], "--avg-bits", average, "--bits", neighbours(average))
        assert found["gib"]["paper"] - PUBLISHED[name][average] == pytest.approx(difference, abs=0.02)

    def test_every_published_row_is_in_one_of_the_lists(self) -> None:
        assert sorted([*FITS, *MISSES]) == sorted((name, average) for name in PUBLISHED for average in PUBLISHED[name])

    def test_three_bits_count_as_3_2(self, dry: Any, folders: dict[str, Path]) -> None:
        two, three = (dry(folders["8x7b"], "--avg-bits", b, "--bits", b) for b in (2, 3))
        weights = two["weights"]["experts"]
        assert three["gib"]["paper"] - two["gib"]["paper"] == pytest.approx(weights * 1.2 / 8 / GIB)

    def test_four_and_eight_bits_count_as_they_are(self, dry: Any, folders: dict[str, Path]) -> None:
        four, eight = (dry(folders["8x7b"], "--avg-bits", b, "--bits", b) for b in (4, 8))
        weights = four["weights"]["experts"]
        assert eight["gib"]["paper"] - four["gib"]["paper"] == pytest.approx(weights * 4 / 8 / GIB)

    def test_flags_of_ours_do_not_change_it(self, dry: Any, folders: dict[str, Path]) -> None:
        plain = dry(folders["8x7b"])
        other = dry(folders["8x7b"], "--group-size", 64, "--linear-bits", 8)
        assert other["gib"]["paper"] == plain["gib"]["paper"]
        assert other["gib"]["ours"] > plain["gib"]["ours"]


class TestOurs:
    @pytest.mark.parametrize("name", SHIPPED)
    @pytest.mark.parametrize(
        "flags", [("--avg-bits", "2.3"), ("--avg-bits", "3", "--bits", "3", "--linear-bits", "16")]
    )
    def test_is_the_estimate_of_the_checkpoint(
        self, moeq: Moeq, dry: Any, folders: dict[str, Path], name: str, flags: tuple[str, ...]
    ) -> None:
        alone = dry(folders[name], *flags)
        assert alone["sizes"] == dry(MODELS / name, *flags)["sizes"]
        assert alone["sizes"] == json.loads(moeq("plan", MODELS / name, *flags, "--json").out)["sizes"]
        assert alone["gib"]["ours"] == alone["sizes"]["total_bytes"] / GIB
        assert alone["gib"]["bf16"] == alone["sizes"]["source_bytes"] / GIB

    def test_packs_densely(self, dry: Any, folders: dict[str, Path]) -> None:
        found = dry(folders["8x7b"], "--avg-bits", "2.5", "--bits", "1,2,3")
        weights = found["weights"]
        assert found["sizes"]["expert_bytes"] == weights["experts"] * (2.5 + 32 / 128) / 8
        # Four linears per layer carry 16 bytes of shape each.
        assert found["sizes"]["linear_bytes"] == weights["linears"] * (4 + 16 / 128) / 8 + 16 * 4 * 32
        assert found["sizes"]["kept_bytes"] == 2 * (weights["embeddings"] + weights["rest"])
        assert found["gib"]["ours"] < found["gib"]["paper"]

    def test_trellises_have_a_scale_per_row_and_a_sign_per_input(self, dry: Any, folders: dict[str, Path]) -> None:
        found = dry(folders["8x7b"], "--avg-bits", "2", "--scheme", "trellis")
        scales, signs = 2 * (2 * 14336 + 4096) * 8 * 32, (4096 + 14336) // 8 * 32
        assert found["sizes"]["expert_bytes"] == found["weights"]["experts"] * 2 // 8 + scales + signs

    @pytest.mark.parametrize(
        ("average", "counts"), [("1.75", (3, 4, 1)), ("2", (2, 4, 2)), ("2.125", (2, 3, 3)), ("2.5", (2, 0, 6))]
    )
    def test_counts_are_the_methods(
        self, dry: Any, folders: dict[str, Path], average: str, counts: tuple[int, ...]
    ) -> None:
        found = dry(folders["8x7b"], "--avg-bits", average)["experts_per_width"]
        assert found == {str(bits): 32 * count for bits, count in zip((1, 2, 3), counts, strict=True)}

    def test_fractions_are_carried_on_between_layers(self, dry: Any, folders: dict[str, Path]) -> None:
        found = dry(folders["8x22b"], "--avg-bits", "2.4")["experts_per_width"]
        assert sum(int(bits) * count for bits, count in found.items()) == int(2.4 * 56 * 8)

    def test_fits_a_budget(self, dry: Any, folders: dict[str, Path]) -> None:
        found = dry(folders["8x7b"], "--budget-gib", 16)
        bit = found["weights"]["experts"] / 256 / 8 / GIB
        assert 16 - bit < found["gib"]["ours"] <= 16

    def test_a_config_without_dtype_is_of_16_bits(self, dry: Any, tmp_path: Path, folders: dict[str, Path]) -> None:
        config = {key: value for key, value in MIXTRAL.items() if key != "torch_dtype"}
        plain = dry(write_config(tmp_path / "plain", config))
        assert plain["sizes"] == dry(folders["8x7b"])["sizes"]


class TestCommand:
    def test_prints_a_table(self, moeq: Moeq, folders: dict[str, Path]) -> None:
        outcome = moeq("plan", folders["8x7b"], "--dry-run", "--avg-bits", "2.5", "--bits", "2,3")
        row = next(line for line in outcome.out.splitlines() if line.startswith("│"))
        assert row.replace("│", " ").split() == ["128", "128", "2.5000", "86.99", "15.57", "16.11"]

    def test_with_weights_prints_what_quantize_does(self, moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
        flags = (tiny_mixtral, "--dry-run", "--group-size", 32)
        commands = (("plan", *flags), ("quantize", *flags, "-o", tmp_path / "out"))
        planned, quantized = (moeq(*command).out.splitlines() for command in commands)
        assert [line for line in planned if not line.startswith("planning takes ")] == [
            line for line in quantized if not line.startswith("quantizing takes ")
        ]
        planned, quantized = (json.loads(moeq(*command, "--json").out) for command in commands)
        assert planned.pop("needs") != quantized.pop("needs")
        assert planned == quantized

    def test_and_an_output_exclude_each_other(self, moeq: Moeq, folders: dict[str, Path], tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        assert "-o and --dry-run" in one_line(moeq("plan", folders["8x7b"], "--dry-run", "-o", path))
        assert not path.exists()

    def test_without_it_weights_are_needed(self, moeq: Moeq, folders: dict[str, Path]) -> None:
        assert "expected model.safetensors or model.safetensors.index.json" in one_line(moeq("plan", folders["8x7b"]))

    def test_refuses_what_cannot_be_packed(self, moeq: Moeq, folders: dict[str, Path]) -> None:
        message = one_line(moeq("plan", folders["8x7b"], "--dry-run", "--group-size", 96))
        assert "config.json: tensor model.layers.0.block_sparse_moe.experts.0.w1.weight: expected an input" in message

    @pytest.mark.parametrize(
        ("text", "fragment"),
        [
            ("{", "not valid JSON"),
            ("[]", "expected an object, found list"),
            ("{}", "model_type None: expected a model with routed experts: "),
            (json.dumps({"model_type": "llama"}), "model_type 'llama': expected a model with routed experts: "),
            (json.dumps({"model_type": "mixtral"}), "expected a positive integer hidden_size"),
            (json.dumps(MIXTRAL | {"hidden_size": "4096"}), "hidden_size: expected a positive integer"),
            (json.dumps(MIXTRAL | {"dtype": "four\nbits"}), "dtype: expected bfloat16, float16 or float32"),
            (json.dumps(MIXTRAL | {"quantization_config": {"quant_method": "aqlm"}}), "quantized already (aqlm)"),
            (json.dumps(MIXTRAL | {"quantization_config": 8}), "quantization_config: expected an object, found 8"),
        ],
    )
    def test_damaged_configs(self, moeq: Moeq, tmp_path: Path, text: str, fragment: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(text)
        message = one_line(moeq("plan", tmp_path, "--dry-run"))
        assert f"{path}: " in message
        assert fragment in message

    @pytest.mark.parametrize("field", sorted(set(LARGER) | {"num_key_value_heads", "num_local_experts", "vocab_size"}))
    @pytest.mark.parametrize("value", [None, 0])
    def test_missing_fields_do_not_become_another_models(
        self, moeq: Moeq, tmp_path: Path, field: str, value: int | None
    ) -> None:
        config = {key: number for key, number in MIXTRAL.items() if key != field}
        config |= {} if value is None else {field: value}
        message = one_line(moeq("plan", write_config(tmp_path / "model", config), "--dry-run"))
        words = f"expected a positive integer {field}" if value is None else f"{field}: expected a positive integer"
        assert f"config.json: {words}" in message

    def test_no_config(self, moeq: Moeq, tmp_path: Path) -> None:
        assert f"{tmp_path / 'config.json'}: expected a JSON file" in one_line(moeq("plan", tmp_path, "--dry-run"))

    def test_a_missing_transformers_is_named(
        self, moeq: Moeq, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert "expected the package transformers, found none installed: pip install '.[hf]'" in one_line(
            moeq("plan", folders["8x7b"], "--dry-run")
        )

    def test_writes_nothing(self, moeq: Moeq, folders: dict[str, Path]) -> None:
        assert moeq("plan", folders["8x7b"], "--dry-run").code == 0
        assert [path.name for path in folders["8x7b"].iterdir()] == ["config.json"]
