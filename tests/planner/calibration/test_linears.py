"""GPTQ of linears outside the experts: in every architecture, in the layer's order, better than rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planner.calibration.gptq.linears import quantize_linears
from planner.calibration.gptq.stages import NEEDS_EXPERTS, NOT_CALLED, ConstantExperts, find_stages
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.routed import first_hidden
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.settings import QuantizeSettings
from tests.conftest import Outcome
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.planner.model.test_architectures import CALIBRATED, build
from vllm_moeq.format import Linear

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Run = Callable[..., Outcome]


def inputs(decoder: Decoder, where: Path) -> torch.Tensor:
    tokens = torch.randint(5, decoder.vocabulary, (4, 24), generator=torch.Generator().manual_seed(1))
    return first_hidden(decoder, tokens, where).load(0)


@pytest.mark.parametrize("name", CALIBRATED)
def test_all_linears_of_every_architecture_are_calibrated(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(name, folder)
    with SourceModel(folder) as source:
        layout = read_layout(source)
        decoder = Decoder(source, layout, CPU, torch.float32)
        hidden = inputs(decoder, tmp_path)
        settings = QuantizeSettings("gptq", linear=Linear(bits=4, group_size=32), gptq=GptqSettings())
        seen: set[str] = set()
        for index in range(len(decoder)):
            names = tuple(it for it in layout.linears if it.startswith(f"model.layers.{index}."))
            found = quantize_linears(decoder, index, names, settings, hidden, hidden + 0.01)
            assert found.missed == {}
            assert set(found.tensors) == set(names)
            seen.update(names)
        assert seen == set(layout.linears)


def test_stages_are_in_the_layers_order(tiny_mixtral: Path, tmp_path: Path) -> None:
    with SourceModel(tiny_mixtral) as source:
        decoder = Decoder(source, read_layout(source), CPU, torch.float32)
        hidden = inputs(decoder, tmp_path)
        block = "model.layers.0.self_attn"
        names = [f"{block}.{part}.weight" for part in ("o_proj", "v_proj", "q_proj", "k_proj")]
        router = "model.layers.0.block_sparse_moe.gate.weight"
        experts = ConstantExperts()
        with decoder.layer(0, experts) as call:
            found = find_stages(decoder, 0, [*names, router], call, experts, hidden[:1])
            assert [set(stage.modules) for stage in found.stages] == [set(names[1:]), {names[0]}]
            assert found.missed == {router: NOT_CALLED}  # it is no linear in transformers
            columns = source.shards.info(names[0]).shape[1]
            with found.stages[1].reader(call) as read:
                assert read(hidden).shape == (hidden[..., 0].numel(), columns)


def test_a_linear_behind_the_experts_is_left_to_rounding(tiny_mixtral: Path, tmp_path: Path) -> None:
    with SourceModel(tiny_mixtral) as source:
        decoder = Decoder(source, read_layout(source), CPU, torch.float32)
        hidden, name = inputs(decoder, tmp_path), "model.layers.0.self_attn.o_proj.weight"
        experts = ConstantExperts()
        with decoder.layer(0, experts) as call:

            def behind(states: torch.Tensor) -> torch.Tensor:
                """Run the layer on the output of its experts."""
                return call(experts(states, states, states) + states)

            found = find_stages(decoder, 0, [name], behind, experts, hidden[:1])
        assert found.stages == ()
        assert found.missed == {name: NEEDS_EXPERTS}


def test_tokens_that_are_not_finite_are_left_out(tiny_mixtral: Path, tmp_path: Path) -> None:
    with SourceModel(tiny_mixtral) as source:
        decoder = Decoder(source, read_layout(source), CPU, torch.float32)
        hidden = inputs(decoder, tmp_path)
        broken = hidden.clone()
        broken[3] = float("nan")  # a whole sequence: attention spreads what one token has
        names = tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo")
        settings = QuantizeSettings("gptq", linear=Linear(bits=4, group_size=32), gptq=GptqSettings())
        expected = quantize_linears(decoder, 0, names, settings, hidden[:3], hidden[:3])
        found = quantize_linears(decoder, 0, names, settings, hidden, broken)
        assert found.missed == {}
        for name in names:
            assert all(torch.equal(tensor, expected.tensors[name][key]) for key, tensor in found.tensors[name].items())
        nothing = quantize_linears(decoder, 0, names, settings, broken[3:], None)
        assert set(nothing.missed) == set(names)


def test_each_part_of_the_method_makes_the_model_better(tmp_path: Path, moeq: Run) -> None:
    values, held_out = {}, ("--data", MIXTRAL / "held_out.txt", "--reference", MIXTRAL, "--max-tokens", 8192)
    plan = tmp_path / "plan.json"
    assert moeq("plan", MIXTRAL, "-o", plan, "--method", "uniform", "--avg-bits", 2).code == 0
    for name, flags in {
        "old": ("--calibration", "symmetric", "--linear-quantizer", "rtn"),
        "linears": ("--calibration", "symmetric"),
        "new": (),
    }.items():
        output = tmp_path / name
        given = ("--plan", plan, "--data", CALIBRATION_TEXT, "--samples", 32, "--seq-len", 256, "-o", output)
        found = moeq("quantize", MIXTRAL, *given, *flags)
        assert found.code == 0, found.err
        assert moeq("verify", output).code == 0
        # Perplexity on so few tokens differs by less than processors round.
        values[name] = json.loads(moeq("eval", output, *held_out, "--json").out)["kl"]["mean"]
        report = json.loads((output / "quantization_report.json").read_text())
        assert "linear_fallback" not in report
        assert report["settings"]["linear_quantizer"] == ("rtn" if name == "old" else "gptq")
    assert values["new"] < values["linears"] < values["old"]


def test_refusals(tmp_path: Path, moeq: Run) -> None:
    found = moeq("quantize", MIXTRAL, "--linear-quantizer", "gptq", "-o", tmp_path / "out")
    assert found.code == 2
    assert "--linear-quantizer gptq: expected --quantizer gptq with it" in found.err
