"""Experts make up for what quantization took from their layer's output before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.calibration.gptq.layer import quantize_layer
from planner.calibration.gptq.moments import Inputs, Moments, trust
from planner.calibration.reading.decoder import Decoder, LayerCall
from planner.calibration.reading.routed import Routed, first_hidden, outputs_factor, route
from planner.calibration.reading.streams import Streams, advance_original
from planner.calibration.reading.text import calibration_text
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.settings import QuantizeSettings
from tests.architectures import build
from tests.conftest import Outcome
from tests.paths import CALIBRATION_TEXT, MIXTRAL, QWEN

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def tokens(model: Path, sequences: int, length: int) -> torch.Tensor:
    return calibration_text(model, str(CALIBRATION_TEXT), sequences, length, 0).tokens


@pytest.mark.parametrize(("name", "factor"), [("qwen2_moe", 1.0), ("deepseek_v3", 1.0), ("granitemoe", 0.5)])
def test_a_layer_is_asked_how_it_adds_its_experts_outputs(name: str, factor: float, tmp_path: Path) -> None:
    """A shared expert beside them changes nothing. Granite multiplies what it adds."""
    build(name, tmp_path / "model")
    with SourceModel(tmp_path / "model") as source:
        decoder = Decoder(source, read_layout(source), CPU, torch.float32)
        hidden = first_hidden(decoder, torch.randint(5, decoder.vocabulary, (2, 24)), tmp_path)
        for index in decoder.moe:
            routed = route(decoder, index, hidden.load(0), hidden, keep_base=True)
            assert outputs_factor(decoder, index, hidden.load(0), routed) == pytest.approx(factor, rel=1e-5)


def test_a_norm_behind_the_experts_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma's layers have one; here it is put around Mixtral's block."""
    build("mixtral", tmp_path / "model")
    with SourceModel(tmp_path / "model") as source:
        decoder = Decoder(source, read_layout(source), CPU, torch.float32)
        hidden = first_hidden(decoder, torch.randint(5, decoder.vocabulary, (2, 24)), tmp_path)
        layer = decoder.layer

        @contextmanager
        def normed(*arguments: Any) -> Iterator[LayerCall]:
            with layer(*arguments) as call:
                yield lambda part: part + torch.nn.functional.normalize(call(part) - part, dim=-1)

        monkeypatch.setattr(decoder, "layer", normed)
        routed = route(decoder, 0, hidden.load(0), hidden, keep_base=True)
        assert outputs_factor(decoder, 0, hidden.load(0), routed) is None


def test_the_runner_hands_it_to_down_projections(
    tmp_path: Path, moeq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Inputs] = []
    of = Moments.of

    def spy(parts: Iterable[Inputs]) -> Moments:
        found = list(parts)
        seen.extend(found)
        return of(found)

    monkeypatch.setattr(Moments, "of", spy)
    flags = ("--data", CALIBRATION_TEXT, "--samples", "8", "--seq-len", "64", "--method", "uniform")
    for calibration in ("asymmetric", "symmetric"):
        seen.clear()
        more = ("--avg-bits", "2", "--min-tokens", "1", "--calibration", calibration)
        made = moeq("quantize", QWEN, *flags, *more, "-o", tmp_path / calibration)
        assert made.code == 0, made.err
        given = [part for part in seen if part.lost is not None]
        assert bool(given) == (calibration == "asymmetric")
        assert all(bool(torch.isfinite(part.lost).all()) for part in given if part.lost is not None)
        assert any(bool(part.lost.any()) for part in given if part.lost is not None) == bool(given)


def test_a_tokens_experts_share_what_was_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    base, original = torch.randn((2, 6, 8), generator=generator)
    weights = torch.rand((6, 2), generator=generator)
    weights[3] = 0
    ids, nothing = torch.zeros((6, 2), dtype=torch.int64), torch.zeros(6, 2)
    own = Routed(base, torch.zeros(6, 8), ids, weights, nothing, base=base)
    theirs = Routed(original, torch.zeros(6, 8), ids, weights, nothing, base=original)
    whole = own.beside(theirs, factor=0.5)
    places = torch.tensor([0, 1, 2, 4, 5])
    share = whole.lost(places, CPU)
    assert share is not None
    made_up = sum(0.5 * weights[places, slot, None] * share for slot in range(2))
    torch.testing.assert_close(made_up, (original - base)[places])
    none = whole.lost(torch.tensor([3]), CPU)  # no weight can make up for it
    assert none is not None
    assert not none.any()
    assert own.lost(places, CPU) is None
    assert own.beside(theirs).lost(places, CPU) is None
    original[1, 4] = float("inf")  # it would spoil the moments of all tokens
    cut = whole.lost(places, CPU)
    assert cut is not None
    assert not cut[1].any()
    assert torch.equal(cut[2:], share[2:])


def test_as_many_inputs_as_tokens_are_not_trusted() -> None:
    assert [trust(rows, 64) for rows in (1, 64, 128, 6400)] == [0.0, 0.0, 0.5, 0.99]
    x, lost = torch.randn(64, 64), torch.randn(64, 8)
    found = Moments.of([Inputs(x, x, None, lost)]).lost
    assert found is not None
    assert not found.any()
    x, lost = torch.randn(256, 64), torch.randn(256, 8)
    found = Moments.of([Inputs(x[:99], x[:99], None, lost[:99]), Inputs(x[99:], x[99:], None, lost[99:])]).lost
    torch.testing.assert_close(found, 0.75 * lost.mT @ x / 256)
    weights = torch.tensor([1.0, 0.0]).repeat(128)  # half of the tokens do not count
    found = Moments.of([Inputs(x, x, weights, lost)]).lost
    torch.testing.assert_close(found, 0.5 * (lost * weights[:, None]).mT @ x / 256)


def test_layers_come_closer_to_the_originals_output(tmp_path: Path) -> None:
    """Behind a layer input with errors, on the tokens of the calibration."""
    with SourceModel(MIXTRAL) as source:
        layout = read_layout(source)
        decoder = Decoder(source, layout, CPU, torch.float32)
        streams = Streams.open(decoder, tokens(MIXTRAL, 32, 256), tmp_path, asymmetric=True)
        hidden, _ = streams.load(0)
        assert streams.original is not None
        exact = advance_original(decoder, 0, streams.original, last=False)
        assert exact is not None
        wanted = streams.original.load(1).flatten(0, 1)
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        noisy = hidden + 0.1 * noise @ torch.diag(hidden.flatten(0, 1).std(dim=0))
        layer = layout.layers[0]
        settings = QuantizeSettings("gptq", gptq=GptqSettings())
        errors = []
        for factor in (None, 1.0):
            routed = route(decoder, 0, noisy, streams.quantized, keep_base=True).beside(exact, factor)
            for _ in quantize_layer(decoder, layer, [2] * layer.num_experts, routed, settings, [CPU]):
                pass
            assert routed.base is not None
            errors.append(float((routed.base + routed.outputs - wanted).norm()))
        assert errors[1] < 0.99 * errors[0]
