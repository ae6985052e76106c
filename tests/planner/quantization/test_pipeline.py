from __future__ import annotations

import dataclasses
import json
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.output.checkpoint import CheckpointWriter, check_space
from planner.plan_file import read_plan
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions
from planner.quantization.quantizers import QUANTIZERS, quantize_linear, quantizer_for
from planner.quantization.run import quantize
from planner.quantization.settings import QuantizeSettings
from tests.folders import contents
from tests.paths import MIXTRAL, MOEQ
from vllm_moeq.format import GRID, CheckpointError, Linear, MoeqError, ShardSet, UsageError, load_config, verify
from vllm_moeq.format.strangers import NOT_ALONE

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.block_sparse_moe.experts"
SETTINGS = QuantizeSettings(group_size=32, linear=Linear(bits=4, group_size=32))
FIRST_SHARD = "model-00001-of-00003.safetensors"

Change = Callable[..., Any]


class Interrupted(Progress):
    """Presses Ctrl-C when the pipeline reports its first layer, which is written by then."""

    def line(self, text: str) -> None:
        raise KeyboardInterrupt(text)


def run(
    source: Path, output: Path, settings: QuantizeSettings = SETTINGS, progress: Progress | None = None, **options: Any
) -> Path:
    with SourceModel(source) as model:
        layout = read_layout(model)
        made = make_plan(
            model, layout, PlanOptions(**{"avg_bits": Fraction(2), "bit_choices": (1, 2, 3), **options}),
            Progress(quiet=True),
        )  # fmt: skip
        quantize(model, layout, made, output, settings, progress or Progress(quiet=True))
    return output


def interrupt(source: Path, output: Path) -> Path:
    """Leave a folder with the first of three shards."""
    with pytest.raises(KeyboardInterrupt):
        run(source, output, progress=Interrupted(quiet=True))
    partial = output.with_name(f"{output.name}.partial")
    assert [path.name for path in partial.glob("*.safetensors")] == [FIRST_SHARD]
    return partial


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        dataclasses.replace(SETTINGS, quantizer="rtn", one_bit="hqq", group_size=64),
        dataclasses.replace(SETTINGS, one_bit="rtn", group_size=-1, linear=Linear(bits=8, group_size=64)),
    ],
    ids=["default", "rtn", "whole rows"],
)
def test_the_file_holds_what_the_quantizer_returns(
    tiny_mixtral: Path, all_widths_plan: Path, tmp_path: Path, settings: QuantizeSettings
) -> None:
    made, output = read_plan(all_widths_plan), tmp_path / "out"
    with SourceModel(tiny_mixtral) as model:
        layout = read_layout(model)
        quantize(model, layout, made, output, settings, Progress(quiet=True))
        written = ShardSet(output)
        for expert, bits in enumerate(made.experts[LAYER]):
            name = f"{LAYER}.{expert}.w2"
            quantizer = quantizer_for(bits, settings.quantizer, settings.one_bit)
            expected = quantizer(model.shards.load(f"{name}.weight"), bits, settings.group_size)
            for suffix, tensor in expected.tensors().items():
                assert torch.equal(written.load(f"{name}.{suffix}"), tensor)
    verify(output)


def test_linears_hold_what_their_quantizer_returns(tiny_mixtral: Path, quantized_mixtral: Path) -> None:
    base = "model.layers.1.self_attn.o_proj"
    spec = load_config(quantized_mixtral).linear
    expected = quantize_linear(ShardSet(tiny_mixtral).load(f"{base}.weight"), spec)
    written = ShardSet(quantized_mixtral)
    assert all(torch.equal(written.load(f"{base}.{suffix}"), value) for suffix, value in expected.items())


def test_kept_tensors_are_copied_bit_for_bit(tiny_mixtral: Path, quantized_mixtral: Path) -> None:
    with SourceModel(tiny_mixtral) as model:
        written = ShardSet(quantized_mixtral)
        kept = read_layout(model).kept
        assert all(torch.equal(written.load(name), model.shards.load(name)) for name in kept)


def test_the_config_says_what_was_done(quantized_mixtral: Path, all_widths_plan: Path) -> None:
    config = load_config(quantized_mixtral)
    assert config.experts == read_plan(all_widths_plan).experts
    assert (config.group_size, config.plan.quantizer) == (32, "hqq")
    assert config.unquantized == [f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)] + ["lm_head"]


def test_the_rest_of_the_config_is_the_models(tiny_mixtral: Path, quantized_mixtral: Path) -> None:
    config = json.loads((quantized_mixtral / "config.json").read_text())
    del config["quantization_config"]
    for key, value in NOT_ALONE.items():
        assert config.pop(key) == value
    assert config == json.loads((tiny_mixtral / "config.json").read_text())


def test_the_report_has_an_error_for_every_expert(quantized_mixtral: Path) -> None:
    report = json.loads((quantized_mixtral / "quantization_report.json").read_text())
    errors = [entry["relative_error"] for layer in report["layers"] for entry in layer["experts"]]
    assert len(errors) == 16
    assert all(0 < error < 1 for error in errors)


def test_more_bits_err_less(quantized_mixtral: Path) -> None:
    report = json.loads((quantized_mixtral / "quantization_report.json").read_text())
    by_width = {entry["bits"]: entry["relative_error"] for entry in report["layers"][0]["experts"]}
    assert by_width[8] < by_width[4] < by_width[3] < by_width[2] < by_width[1]


def test_only_the_documented_files_are_left(quantized_mixtral: Path) -> None:
    names = {path.name for path in quantized_mixtral.iterdir() if path.suffix != ".safetensors"}
    documented = {"config.json", "model.safetensors.index.json", "plan.json", "quantization_report.json"}
    assert names == {*documented, "README.md", "generation_config.json"}


def test_files_have_the_usual_mode(quantized_mixtral: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in quantized_mixtral.iterdir()}
    assert modes == {stat.S_IMODE((quantized_mixtral / "config.json").stat().st_mode)}


def test_the_tokenizer_is_copied(mixtral_copy: Path, tmp_path: Path) -> None:
    (mixtral_copy / "tokenizer.json").write_text("{}")
    assert (run(mixtral_copy, tmp_path / "out") / "tokenizer.json").read_text() == "{}"


def test_an_interrupted_run_leaves_no_output(tiny_mixtral: Path, tmp_path: Path) -> None:
    interrupt(tiny_mixtral, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_continued_run_writes_the_same_bytes(tiny_mixtral: Path, tmp_path: Path) -> None:
    interrupt(tiny_mixtral, tmp_path / "resumed")
    assert contents(run(tiny_mixtral, tmp_path / "resumed")) == contents(run(tiny_mixtral, tmp_path / "whole"))


def test_a_continued_run_keeps_finished_shards(tiny_mixtral: Path, tmp_path: Path) -> None:
    partial = interrupt(tiny_mixtral, tmp_path / "out")
    inode = (partial / FIRST_SHARD).stat().st_ino
    assert (run(tiny_mixtral, tmp_path / "out") / FIRST_SHARD).stat().st_ino == inode


def test_a_continued_run_replaces_a_damaged_shard(tiny_mixtral: Path, tmp_path: Path) -> None:
    partial = interrupt(tiny_mixtral, tmp_path / "out")
    (partial / FIRST_SHARD).write_bytes(b"damaged")
    assert verify(run(tiny_mixtral, tmp_path / "out")).experts == 16


def test_temporary_files_of_a_killed_run_do_not_reach_the_output(tiny_mixtral: Path, tmp_path: Path) -> None:
    partial = interrupt(tiny_mixtral, tmp_path / "out")
    for name in (".model-00002-of-00003.safetensors.1.tmp", ".tmpAbC123"):
        (partial / name).write_bytes(b"half a shard")
    assert not list(run(tiny_mixtral, tmp_path / "out").glob(".*"))


def test_a_run_that_fails_at_its_end_can_be_continued(mixtral_copy: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    blocker = tmp_path / "out.partial" / "plan.json"
    interrupt(mixtral_copy, output)
    progress = Progress(listener=lambda _: blocker.mkdir(exist_ok=True))
    with pytest.raises(UsageError, match=r"plan\.json: expected a file to write, found a folder"):
        run(mixtral_copy, output, progress=progress)
    blocker.rmdir()
    assert verify(run(mixtral_copy, output)).experts == 16


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"avg_bits": Fraction("2.5")}, r"plan \(.*avg_bits.*\)"),
        ({"settings": dataclasses.replace(SETTINGS, quantizer="rtn")}, r"settings \(quantizer\)"),
        (
            {"avg_bits": Fraction("2.5"), "settings": dataclasses.replace(SETTINGS, one_bit="rtn")},
            r"plan \(.+\) and settings \(one_bit\)",
        ),
    ],
)
def test_an_unfinished_run_with_other_settings_is_refused(
    tiny_mixtral: Path, tmp_path: Path, changed: dict[str, Any], what: str
) -> None:
    partial = interrupt(tiny_mixtral, tmp_path / "out")
    with pytest.raises(UsageError, match=f"an unfinished run with other {what}; start anew"):
        run(tiny_mixtral, tmp_path / "out", **changed)
    assert (partial / FIRST_SHARD).exists()


def test_an_unfinished_run_of_another_model_is_refused(
    tiny_mixtral: Path, initial_mixtral: Path, tmp_path: Path
) -> None:
    interrupt(tiny_mixtral, tmp_path / "out")
    with pytest.raises(UsageError, match=r"an unfinished run with other model( \(.+\))? and plan( \(.+\))?;"):
        run(initial_mixtral, tmp_path / "out")


def test_a_second_writer_is_refused(tiny_mixtral: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", {"run": 1})
    with pytest.raises(UsageError, match="another run is writing this output"):
        run(tiny_mixtral, tmp_path / "out")
    writer.abandon()
    assert run(tiny_mixtral, tmp_path / "out").is_dir()


def test_a_damaged_tensor_leaves_nothing(mixtral_copy: Path, change_tensor: Change, tmp_path: Path) -> None:
    name = f"{LAYER}.0.w3.weight"
    shard = change_tensor(mixtral_copy, name, lambda weight: torch.full_like(weight, float("inf")))
    before = set(tmp_path.iterdir())
    with pytest.raises(MoeqError) as error:
        run(mixtral_copy, tmp_path / "out")
    assert f"{shard}: tensor {name}: expected finite weights" in str(error.value)
    assert set(tmp_path.iterdir()) == before


def test_an_existing_output_is_refused(tiny_mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="the output exists already"):
        run(tiny_mixtral, tmp_path / "out")


def test_a_second_quantizer_of_another_scheme_is_refused(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = type("Other", (type(GRID),), {"name": "other"})()
    monkeypatch.setitem(QUANTIZERS, "sign", dataclasses.replace(QUANTIZERS["sign"], scheme=other))
    with pytest.raises(UsageError, match=rf"quantizer sign: expected .* scheme grid.* for {LAYER}.*, found other"):
        run(tiny_mixtral, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_without_a_parent_is_refused(tiny_mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected the parent folder"):
        run(tiny_mixtral, tmp_path / "none" / "out")


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No space left on device: 9,223,372,036,854,775,807 bytes needed"):
        check_space(tmp_path / "out", 2**63 - 1)


def test_shards_of_an_unfinished_run_count_as_written(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / FIRST_SHARD).open("wb") as file:
        file.truncate(1 << 43)
    check_space(tmp_path / "out", (1 << 43) + 1)
    with pytest.raises(CheckpointError, match="No space left"):
        check_space(tmp_path / "other", 1 << 60)


def test_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = MIXTRAL
    command = [MOEQ, "quantize", str(source), "--avg-bits", "2.5", "-o"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)

    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "killed.partial"
    while process.poll() is None and not list(partial.glob("model-00001-of-*.safetensors")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not killed.exists()

    again = subprocess.run([*command, str(killed)], check=True, capture_output=True, text=True)
    assert "layers.0.block_sparse_moe.experts: done by an earlier run" in again.stderr
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (killed / path.name).read_bytes()
