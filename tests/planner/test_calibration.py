"""Calibration: text, layers run one at a time, statistics, and GPTQ of whole models."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.calibration.collect import collect
from planner.calibration.decoder import Decoder
from planner.calibration.experts import load_expert
from planner.calibration.gptq_layer import quantize_layer
from planner.calibration.hidden import HiddenStates
from planner.calibration.routed import Routed, finish, first_hidden, route
from planner.calibration.runner import GptqRunner
from planner.calibration.statistics import observe, read_statistics
from planner.calibration.text import calibration_text, documents
from planner.checkpoint import SourceModel
from planner.evaluation import perplexity
from planner.models import read_layout
from planner.options import PlanOptions
from planner.pipeline import quantize
from planner.planning import make_plan
from planner.progress import Progress
from planner.quantizers.gptq import GptqSettings
from planner.settings import QuantizeSettings, default_linear
from tests.conftest import Outcome
from vllm_moeq.format import CheckpointError, UsageError

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
TEXT = MODELS / "calibration.jsonl"
CPU = torch.device("cpu")
Run = Callable[..., Outcome]


@pytest.fixture(scope="module", params=["stdlib-mixtral", "stdlib-qwen3-moe"])
def shipped(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)


def forward(folder: Path, tokens: torch.Tensor, where: Path) -> dict[int, tuple[Routed, torch.Tensor]]:
    """Run a model layer by layer; return each layer's routing and output."""
    found = {}
    with SourceModel(folder) as model:
        decoder = Decoder(model, read_layout(model), CPU, torch.float32)
        store = first_hidden(decoder, tokens, where)
        for index in range(len(decoder)):
            hidden = store.load(index)
            routed = route(decoder, index, hidden, store)
            observe(decoder, decoder.moe[index], routed)
            finish(decoder, index, hidden, store.create(index + 1), routed.outputs)
            store.complete(index + 1)
            found[index] = (routed, store.load(index + 1).clone())
    return found


def test_layer_by_layer_equals_transformers(shipped: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = calibration_text(shipped, str(TEXT), 3, 200, 0).tokens
    found = forward(shipped, tokens, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    with torch.inference_mode():
        result = whole.model(input_ids=tokens, output_hidden_states=True)
        last = whole.model.norm(found[max(found)][1])
    for index in range(len(found) - 1):
        assert torch.allclose(found[index][1], result.hidden_states[index + 1], atol=1e-4)
    assert torch.allclose(last, result.last_hidden_state, atol=1e-4)


class TestText:
    def test_sequences_are_drawn_by_seed_and_do_not_overlap(self) -> None:
        folder = MODELS / "stdlib-mixtral"
        one, two = (calibration_text(folder, str(TEXT), 8, 64, seed) for seed in (0, 1))
        assert one.tokens.shape == (8, 64)
        assert not torch.equal(one.tokens, two.tokens)
        assert one.fingerprint() != two.fingerprint()
        assert one.fingerprint() == calibration_text(folder, str(TEXT), 8, 64, 0).fingerprint()
        everything = calibration_text(folder, str(TEXT), 10**6, 64, 0).tokens
        assert len(everything.unique(dim=0)) > 0.99 * len(everything)

    def test_plain_text_and_lines_of_json_are_the_same_tokens(self, tmp_path: Path) -> None:
        folder = MODELS / "stdlib-mixtral"
        (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 50)
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "def f(x):\n    return x\n" * 50}) + "\n\n")
        plain, lines = (calibration_text(folder, str(tmp_path / name), 2, 64, 0) for name in ("a.txt", "a.jsonl"))
        assert torch.equal(plain.tokens, lines.tokens)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("short.txt", b"x = 1\n", "at least 64 tokens"),
            ("binary.txt", b"\xff\xfe\x00" * 100, "UTF-8"),
            ("lines.jsonl", b'{"text": "fine"}\nnot json\n', "line 2: expected a JSON object"),
            ("fields.jsonl", b'{"content": "x"}\n', "line 1: expected a JSON object with a text field"),
            ("deep.jsonl", b"[" * 100_000, "line 1"),
        ],
    )
    def test_refusals(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=message) as error:
            calibration_text(MODELS / "stdlib-mixtral", str(tmp_path / name), 2, 64, 0)
        assert name in str(error.value)

    @pytest.mark.parametrize("data", ["nothing.txt", "owner/name", "owner/name@main", "owner/name@" + "g" * 40])
    def test_datasets_need_a_commit(self, data: str) -> None:
        with pytest.raises(UsageError, match="40-digit commit"):
            documents(data, 100)

    def test_a_dataset_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(UsageError, match=r"--data Salesforce/wikitext@b08601e0: cannot be read"):
            list(documents("wikitext2", 100))


class TestStatistics:
    def test_they_are_those_of_the_model(self, shipped: Path, tmp_path: Path, moeq: Run) -> None:
        output = tmp_path / "stats.safetensors"
        found = moeq("calibrate", shipped, "--data", TEXT, "-o", output, "--samples", 4, "--seq-len", 128, "--json")
        assert found.code == 0, found.err
        tokens = calibration_text(shipped, str(TEXT), 4, 128, 0).tokens
        with SourceModel(shipped) as model:
            layout = read_layout(model)
            read, facts = read_statistics(output, layout)
            passes = forward(shipped, tokens, tmp_path / "again")
            for layer in layout.layers:
                routed = passes[layer.index][0]
                counts = torch.bincount(routed.ids.flatten(), minlength=layer.num_experts)
                assert torch.equal(read[layer.prefix].tokens, counts)
                assert json.loads(found.out)["tokens"][layer.prefix] == counts.tolist()
                busiest = int(counts.argmax())
                at = (routed.ids == busiest).nonzero(as_tuple=True)
                inputs = routed.inputs[at[0]]
                expert = load_expert(model, layer, busiest, CPU, torch.float32)
                inner = expert.inner(inputs, torch.nn.functional.silu)
                ours = read[layer.prefix]
                assert torch.allclose(ours.input_square[busiest], inputs.square().mean(dim=0), rtol=1e-4)
                assert torch.allclose(ours.inner_square[busiest], inner.square().mean(dim=0), rtol=1e-4)
                assert torch.allclose(ours.routing_weight[busiest], routed.weights[at].sum(), rtol=1e-4)
                assert torch.allclose(ours.gate_probability[busiest], routed.probabilities[at].sum(), rtol=1e-4)
                assert bool((routed.probabilities <= routed.weights + 1e-6).all())
        assert facts["calibration"]["sequences"] == 4

    def test_a_killed_run_continues(self, tmp_path: Path, moeq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ("calibrate", MODELS / "stdlib-mixtral", "--data", TEXT, "--samples", 2, "--seq-len", 64)
        assert moeq(*arguments, "-o", tmp_path / "whole.safetensors").code == 0
        original, calls = observe, []

        def breaks(*inputs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*inputs)

        monkeypatch.setattr("planner.calibration.collect.observe", breaks)
        assert moeq(*arguments, "-o", tmp_path / "cut.safetensors").code == 130
        assert not (tmp_path / "cut.safetensors").exists()
        refused = moeq(*arguments, "--seed", 1, "-o", tmp_path / "cut.safetensors")
        assert (refused.code, "other calibration" in refused.err) == (2, True)
        assert moeq(*arguments, "-o", tmp_path / "cut.safetensors").code == 0
        assert len(calls) == 5  # the third layer again, and the fourth
        assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert not list(tmp_path.glob("*.partial"))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "--data: calibration needs a text"),
            (("--data", "missing.txt"), "--data: expected a text"),
            (("--data", TEXT, "--seq-len", 4096), "--seq-len: expected at most 1024"),
            (("--data", TEXT, "--device", "cuda:7"), "--device"),
        ],
    )
    def test_refusals(self, tmp_path: Path, moeq: Run, flags: tuple[object, ...], message: str) -> None:
        found = moeq("calibrate", MODELS / "stdlib-mixtral", "-o", tmp_path / "stats.safetensors", *flags)
        assert (found.code, message in found.err) == (2, True), found.err
        assert not list(tmp_path.iterdir())


class TestGptqRun:
    def test_beats_quantizers_without_calibration(self, shipped: Path, tmp_path: Path, moeq: Run) -> None:
        text = (shipped / "held_out.txt").read_text()
        values, reports = {}, {}
        for name, flags in {
            "rtn": ("--quantizer", "rtn"),
            "hqq": ("--quantizer", "hqq"),
            "gptq": ("--data", TEXT, "--samples", 16, "--seq-len", 256),
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
        flags = ("--data", TEXT, "--samples", 2, "--seq-len", 64, "--min-tokens", 40, "--jobs", 2)
        assert moeq("quantize", MODELS / "stdlib-mixtral", "-o", output, *flags).code == 0
        config = json.loads((output / "config.json").read_text())["quantization_config"]["plan"]
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
            (("--quantizer", "rtn", "--data", TEXT), "does not calibrate"),
            (("--symmetric",), "does not calibrate"),
            (("--data", TEXT, "--act-order", "full"), "--static-groups"),
            (("--data", TEXT, "--compat", "--symmetric"), "--compat"),
            (("--data", TEXT, "--damping", 2), "--damping"),
            (("--data", TEXT, "--ray"), "--ray"),
        ],
    )
    def test_refusals(self, tmp_path: Path, moeq: Run, flags: tuple[object, ...], message: str) -> None:
        found = moeq("quantize", MODELS / "stdlib-mixtral", "-o", tmp_path / "out", *flags)
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
                assert bool(torch.isfinite(matrix.scales).all())
                assert bool(torch.isfinite(matrix.zeros).all())


def test_hidden_states_of_a_wrong_size_are_refused(tmp_path: Path) -> None:
    store = HiddenStates(tmp_path / "hidden", (2, 3, 4), torch.float32)
    store.create(0).fill_(1)
    assert not store.has(0)
    store.complete(0)
    assert bool((HiddenStates(tmp_path / "hidden", (2, 3, 4), torch.float32).load(0) == 1).all())
    with (tmp_path / "hidden" / "hidden-00000.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="expected 96 bytes"):
        store.load(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_gptq(output: Path, devices: int = 1) -> None:
    source = MODELS / "stdlib-mixtral"
    with SourceModel(source) as model:
        layout = read_layout(model)
        plan = make_plan(model, layout, PlanOptions(Fraction(5, 2), (1, 2, 3)), Progress(quiet=True))
        chosen = QuantizeSettings("gptq", linear=default_linear(model, layout, 4), gptq=GptqSettings())
        text = calibration_text(source, str(TEXT), 4, 128, 0)
        runner = GptqRunner(text, 1, (CPU,) * devices, torch.float32)
        quantize(model, layout, plan, output, chosen, Progress(quiet=True), runner=runner)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


class TestMethodsThatUseStatistics:
    @pytest.fixture(scope="class")
    def stats(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder, source = tmp_path_factory.mktemp("stats"), MODELS / "stdlib-mixtral"
        text = calibration_text(source, str(TEXT), 4, 128, 0)
        with SourceModel(source) as model:
            layout = read_layout(model)
            collect(model, layout, text, folder / "s.safetensors", {}, CPU, torch.float32, Progress(quiet=True))
        return folder / "s.safetensors"

    @pytest.mark.parametrize(("method", "metric"), [("frequency", "tokens"), ("weight", "gate_probability")])
    def test_most_used_first(self, stats: Path, moeq: Run, method: str, metric: str) -> None:
        flags = ("--method", method, "--stats", stats, "--avg-bits", 2.5, "--json")
        found = moeq("plan", MODELS / "stdlib-mixtral", *flags)
        assert found.code == 0, found.err
        plan = json.loads(found.out)
        for prefix, order in plan["order"].items():
            values = plan["scores"][prefix][metric]
            assert order == sorted(range(8), key=lambda expert: -values[expert])
        assert "note:" not in found.err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--method", "frequency"), "expected --stats FILE"),
            (("--method", "max-var", "--stats", "STATS"), "does not use it"),
            (("--method", "weight", "--stats", "nothing.safetensors"), "nothing.json"),
        ],
    )
    def test_refusals(self, stats: Path, moeq: Run, flags: tuple[str, ...], message: str) -> None:
        found = moeq("plan", MODELS / "stdlib-mixtral", *(str(stats) if flag == "STATS" else flag for flag in flags))
        assert (found.code, message in found.err) == (2, True), found.err

    def test_statistics_of_another_model_are_refused(self, stats: Path, moeq: Run) -> None:
        found = moeq("plan", MODELS / "stdlib-qwen3-moe", "--method", "weight", "--stats", stats)
        assert (found.code, "s.safetensors" in found.err) == (2, True), found.err
