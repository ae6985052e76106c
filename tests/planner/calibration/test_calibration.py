"""Calibration: text, layers run one at a time, statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import Routed, first_hidden, route
from planner.calibration.reading.text import calibration_text, shortage
from planner.calibration.statistics import observe, read_statistics
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantize_rtn, quantize_sign
from planner.text.sources import documents
from tests.conftest import Outcome
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MODELS, SHIPPED
from tests.planner.calibration.layers import reading
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.format import CheckpointError, UsageError
from vllm_moeq.kernels import SILU

CPU = torch.device("cpu")
Run = Callable[..., Outcome]


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)


def forward(folder: Path, tokens: torch.Tensor, where: Path) -> dict[int, tuple[Routed, torch.Tensor]]:
    """Run a model layer by layer; return each layer's routing and output."""
    with reading(folder, tokens, where) as read:
        return {index: (routed, read.store.load(index + 1).clone()) for index, routed in enumerate(read.routed)}


def test_layer_by_layer_equals_transformers(shipped: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = calibration_text(shipped, str(CALIBRATION_TEXT), 3, 200, 0).tokens
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
        folder = MIXTRAL
        one, two = (calibration_text(folder, str(CALIBRATION_TEXT), 8, 64, seed) for seed in (0, 1))
        assert one.tokens.shape == (8, 64)
        assert not torch.equal(one.tokens, two.tokens)
        assert one.fingerprint() != two.fingerprint()
        assert one.fingerprint() == calibration_text(folder, str(CALIBRATION_TEXT), 8, 64, 0).fingerprint()
        everything = calibration_text(folder, str(CALIBRATION_TEXT), 10**6, 64, 0).tokens
        assert len(everything.unique(dim=0)) > 0.99 * len(everything)

    def test_plain_text_and_lines_of_json_are_the_same_tokens(self, tmp_path: Path) -> None:
        folder = MIXTRAL
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
            ("fields.jsonl", b'{"content": "x"}\n', "line 1: expected a field text"),
            ("deep.jsonl", b"[" * 100_000, "line 1"),
        ],
    )
    def test_refusals(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=message) as error:
            calibration_text(MIXTRAL, str(tmp_path / name), 2, 64, 0)
        assert name in str(error.value)

    @pytest.mark.parametrize("wanted", [2, 3, 100])
    def test_fewer_sequences_than_asked_for_are_said(self, tmp_path: Path, wanted: int) -> None:
        (tmp_path / "a.txt").write_text("x = 1\n" * 200)
        text = calibration_text(MIXTRAL, str(tmp_path / "a.txt"), wanted, 128, 0)
        note, found = shortage(text, wanted), len(text.tokens)
        assert (note is None) == (found == wanted)
        if note is not None:
            assert f"a.txt holds {found} sequences of 128 tokens, {wanted} were asked for" in note

    @pytest.mark.parametrize("command", ["quantize", "calibrate", "plan", "compare"])
    def test_every_command_says_so(self, moeq: Run, tmp_path: Path, command: str) -> None:
        (tmp_path / "a.txt").write_text("x = 1\n" * 200)
        own = {
            "quantize": ("--method", "uniform", "--avg-bits", 3, "-o", tmp_path / "out"),
            "calibrate": ("-o", tmp_path / "out.safetensors"),
            "plan": ("--method", "frequency"),
            "compare": ("--methods", "frequency", "--held-out", tmp_path / "a.txt", "-o", tmp_path / "out"),
        }
        flags = ("--data", tmp_path / "a.txt", "--samples", 64, "--seq-len", 128, *own[command])
        outcome = moeq(command, MIXTRAL, *flags)
        assert outcome.code == 0, outcome.err
        assert outcome.err.count("sequences of 128 tokens, 64 were asked for") == 1

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
        found = moeq(
            "calibrate", shipped, "--data", CALIBRATION_TEXT, "-o", output, "--samples", 4, "--seq-len", 128, "--json"
        )
        assert found.code == 0, found.err
        tokens = calibration_text(shipped, str(CALIBRATION_TEXT), 4, 128, 0).tokens
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
                inner = expert.inner(inputs, SILU)
                ours = read[layer.prefix]
                assert torch.allclose(ours.input_square[busiest], inputs.square().mean(dim=0), rtol=1e-4)
                assert torch.allclose(ours.inner_square[busiest], inner.square().mean(dim=0), rtol=1e-4)
                assert torch.allclose(ours.routing_weight[busiest], routed.weights[at].sum(), rtol=1e-4)
                assert torch.allclose(ours.gate_probability[busiest], routed.probabilities[at].sum(), rtol=1e-4)
                assert bool((routed.probabilities <= routed.weights + 1e-6).all())
        assert facts["calibration"]["sequences"] == 4

    def test_a_killed_run_continues(self, tmp_path: Path, moeq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ("calibrate", MIXTRAL, "--data", CALIBRATION_TEXT, "--samples", 2, "--seq-len", 64)
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
        assert len(calls) == MIXTRAL_SIZES.layers + 1  # the third layer again, and those behind it
        assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert not list(tmp_path.glob("*.partial"))

    def test_errors_are_changes_of_the_block(self, tmp_path: Path) -> None:
        """ε of one expert: quantize it alone, run the block, and compare sequence by sequence."""
        source = MIXTRAL
        tokens = calibration_text(source, str(CALIBRATION_TEXT), 3, 64, 0).tokens
        with SourceModel(source) as model:
            decoder = Decoder(model, read_layout(model), CPU, torch.float32)
            store = first_hidden(decoder, tokens, tmp_path)
            layer = decoder.moe[0]
            routed = route(decoder, 0, store.load(0), store)
            found = observe(decoder, layer, routed, 64, (1, 2))
            busiest = int(found.tokens.argmax())
            exact = load_expert(model, layer, busiest, CPU, torch.float32)
            before = routed.outputs.clone()
            for bits, quantizer in ((1, quantize_sign), (2, quantize_rtn)):
                changed = exact.replaced(quantizer(weight, bits, 128).dequantize() for weight in exact.matrices())
                routed.outputs.copy_(before)
                for expert, sign in ((exact, -1.0), (changed, 1.0)):
                    for inputs, share, places in routed.chunks(busiest, CPU):
                        output = expert(inputs, decoder.activation)
                        routed.add(places, sign * output * share[:, None])
                difference = (routed.outputs - before).reshape(3, -1).norm(dim=1).sum()
                assert torch.allclose(found.measured[f"error_{bits}"][busiest], difference, rtol=1e-3)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--data", CALIBRATION_TEXT, "--bits", "2,5"), "--bits: expected widths among"),
            ((), "--data: calibration needs a text"),
            (("--data", "missing.txt"), "--data: expected a text"),
            (("--data", CALIBRATION_TEXT, "--seq-len", 4096), "--seq-len: expected at most 512"),
            (("--data", CALIBRATION_TEXT, "--device", "cuda:7"), "--device"),
        ],
    )
    def test_refusals(self, tmp_path: Path, moeq: Run, flags: tuple[object, ...], message: str) -> None:
        found = moeq("calibrate", MIXTRAL, "-o", tmp_path / "stats.safetensors", *flags)
        assert (found.code, message in found.err) == (2, True), found.err
        assert not list(tmp_path.iterdir())


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
