"""GPTQ of whole models: better, resumable, and honest about experts that saw too little."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.calibration.gptq.layer import quantize_layer
from planner.calibration.gptq.runner import GptqRunner
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.routed import Routed
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.evaluation import perplexity
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.run import quantize
from planner.quantization.settings import QuantizeSettings, default_linear
from tests.conftest import Outcome
from tests.folders import contents
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MODELS, QWEN, SHIPPED
from tests.shipped import MIXTRAL_SIZES
from tests.tiers import thorough
from vllm_moeq.format import SCALE, ZERO

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Run = Callable[..., Outcome]


class TestGptqRun:
    @pytest.mark.parametrize("model", thorough(SHIPPED, [QWEN.name]))
    def test_beats_quantizers_without_calibration(self, model: str, tmp_path: Path, moeq: Run) -> None:
        shipped = MODELS / model
        text = (shipped / "held_out.txt").read_text()
        values, reports = {}, {}
        for name, flags in {
            "rtn": ("--quantizer", "rtn"),
            "hqq": ("--quantizer", "hqq"),
            "gptq": ("--data", CALIBRATION_TEXT, "--samples", 16, "--seq-len", 256),
        }.items():
            output = tmp_path / name
            found = moeq("quantize", shipped, "-o", output, "--avg-bits", 2.5, *flags)
            assert found.code == 0, found.err
            assert moeq("verify", output).code == 0
            reports[name] = json.loads((output / "quantization_report.json").read_text())
            values[name] = perplexity(output, text, Progress(quiet=True), max_tokens=8192)
        assert values["gptq"] < min(values["rtn"], values["hqq"])
        assert reports["gptq"]["calibration"]["sequences"] == 16

    def test_experts_with_few_tokens_are_named(self, tmp_path: Path, moeq: Run) -> None:
        output = tmp_path / "out"
        flags = ("--data", CALIBRATION_TEXT, "--samples", 2, "--seq-len", 64, "--min-tokens", 40, "--jobs", 2)
        outcome = moeq("quantize", MIXTRAL, "-o", output, *flags)
        assert outcome.code == 0, outcome.err
        config = json.loads((output / "config.json").read_text())["quantization_config"]["plan"]
        missed = sum(map(len, config["fallback"].values()))
        assert (
            f"note: {missed} of {MIXTRAL_SIZES.all_experts} experts were quantized without calibration" in outcome.err
        )
        assert "a lower --min-tokens" in outcome.err
        report = json.loads((output / "quantization_report.json").read_text())
        for layer in report["layers"]:
            for entry in layer["experts"]:
                few = entry["tokens"] < 40
                assert few == (entry["expert"] in config["fallback"].get(layer["prefix"], []))
                assert entry["quantizer"] == ("gptq" if not few else "sign" if entry["bits"] == 1 else "hqq")
                if few:
                    assert entry["fallback"] == f"{entry['tokens']} calibration tokens, fewer than 40"

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--quantizer", "gptq"), "--data"),
            (("--quantizer", "rtn", "--data", CALIBRATION_TEXT, "--method", "max-var"), "reads a text"),
            (("--symmetric",), "expected --quantizer gptq"),
            (("--data", CALIBRATION_TEXT, "--act-order", "full"), "--static-groups"),
            (("--data", CALIBRATION_TEXT, "--compat", "--symmetric"), "--compat"),
            (("--data", CALIBRATION_TEXT, "--damping", 2), "--damping"),
            (("--data", CALIBRATION_TEXT, "--ray"), "--ray"),
        ],
    )
    def test_refusals(self, tmp_path: Path, moeq: Run, flags: tuple[object, ...], message: str) -> None:
        found = moeq("quantize", MIXTRAL, "-o", tmp_path / "out", *flags)
        assert (found.code, message in found.err) == (2, True), found.err
        assert not list(tmp_path.iterdir())


class TestOddExperts:
    """An expert without tokens, with one, and inputs that are not finite."""

    @pytest.fixture
    def results(self, tiny_mixtral: Path) -> dict[int, Any]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn((257, 64), generator=generator)
        ids = torch.stack((torch.arange(257) % 4 + 1, torch.full((257,), 5)), dim=1)
        ids[0, 0] = 6  # one token
        inputs[7] = float("nan")
        ids[7] = -1  # as a pass over a model marks it
        inputs[8], ids[8, 0] = 1e30, 7  # finite, but its square is not
        outputs = torch.zeros(257, 64)
        routed = Routed(inputs, outputs, ids, torch.ones(257, 2), torch.ones(257, 2))
        assert routed.dropped == 1
        with SourceModel(tiny_mixtral) as model:
            layout = read_layout(model)
            decoder = Decoder(model, layout, CPU, torch.float32)
            chosen = QuantizeSettings("gptq", group_size=32, gptq=GptqSettings(), min_tokens=1)
            return dict(quantize_layer(decoder, layout.layers[0], [2] * 8, routed, chosen, [CPU]))

    def test_reasons(self, results: dict[int, Any]) -> None:
        assert results[0].fallback == "0 calibration tokens, fewer than 1"
        assert results[0].output_error is None
        assert results[6].fallback is None
        assert results[6].tokens == 1
        assert all("not finite" in results[expert].fallback for expert in (5, 7))
        assert all(results[expert].fallback is None for expert in (1, 2, 3, 4))

    def test_everything_written_is_finite(self, results: dict[int, Any]) -> None:
        assert sorted(results) == list(range(8))
        for result in results.values():
            for matrix in result.matrices.values():
                assert bool(torch.isfinite(matrix.tensors[SCALE]).all())
                assert bool(torch.isfinite(matrix.tensors[ZERO]).all())


def write_gptq(output: Path, devices: int = 1) -> None:
    source = MIXTRAL
    with SourceModel(source) as model:
        layout = read_layout(model)
        plan = make_plan(model, layout, PlanOptions(Fraction(5, 2), (1, 2, 3)), Progress(quiet=True))
        chosen = QuantizeSettings(
            "gptq", linear=default_linear(model, layout, 4), gptq=GptqSettings(), linear_quantizer="gptq"
        )
        text = calibration_text(source, str(CALIBRATION_TEXT), 4, 128, 0)
        runner = GptqRunner(text, 1, (CPU,) * devices, torch.float32)
        quantize(model, layout, plan, output, chosen, Progress(quiet=True), runner=runner)


@pytest.mark.usefixtures("one_thread")
def test_gptq_on_several_threads_writes_the_same(tmp_path: Path) -> None:
    write_gptq(tmp_path / "one")
    write_gptq(tmp_path / "three", devices=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.usefixtures("one_thread")
def test_gptq_killed_at_random_moments_continues_to_the_same_bytes(tmp_path: Path) -> None:
    write_gptq(tmp_path / "warm-up")
    began = time.monotonic()
    write_gptq(tmp_path / "whole")
    whole = time.monotonic() - began
    context, generator, output = multiprocessing.get_context("fork"), random.Random(1), tmp_path / "cut"
    for _ in range(10):
        process = context.Process(target=write_gptq, args=(output,))
        process.start()
        process.join(generator.uniform(0.1, 0.6) * whole)
        process.kill()
        process.join()
        if output.exists():
            break
    if not output.exists():
        write_gptq(output)
    assert contents(output) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
