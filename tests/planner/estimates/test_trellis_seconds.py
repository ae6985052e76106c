"""The time that the search for a trellis's codes takes is announced, with and without a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from planner.estimates.memory import Reading
from planner.estimates.quantizing import quantizing_seconds
from planner.model.layout import Layout, read_layout
from planner.model.source import SourceModel
from planner.quantization.rows import TILES, part_rows
from planner.quantization.settings import QuantizeSettings
from tests.paths import MIXTRAL

CPU = [torch.device("cpu")]
RATES = {"grid": 1e6, "trellis": 1e5}


@pytest.fixture(scope="module")
def source() -> Iterator[SourceModel]:
    with SourceModel(MIXTRAL) as model:
        yield model


@pytest.fixture
def layout(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """The layout, on a machine with round rates."""
    monkeypatch.setattr("planner.estimates.seconds._rate", lambda _bits, scheme, *_: RATES[scheme.name])
    monkeypatch.setattr("planner.estimates.seconds._product_rate", lambda _: 1e9)
    return read_layout(source)


def seconds(source: SourceModel, layout: Layout, bits: int, reading: Reading | None, **settings: Any) -> float:
    widths = {layer.prefix: [bits] * layer.num_experts for layer in layout.layers}
    chosen = QuantizeSettings("gptq" if reading else "hqq", **settings)
    return quantizing_seconds(source.config, layout, widths, chosen, CPU, reading) * torch.get_num_threads()


def test_a_text_adds_to_the_search(source: SourceModel, layout: Layout) -> None:
    weights = layout.num_experts * layout.layers[0].weights_per_expert
    text = Reading(2, 64, streams=2)
    plain = seconds(source, layout, 2, text)
    assert seconds(source, layout, 2, text, scheme="trellis") - plain == pytest.approx(weights / RATES["trellis"])
    assert seconds(source, layout, 8, text, scheme="trellis") == pytest.approx(plain)


def test_without_a_text_the_search_is_all(source: SourceModel, layout: Layout) -> None:
    weights = layout.num_experts * layout.layers[0].weights_per_expert
    assert seconds(source, layout, 2, None, scheme="trellis") == pytest.approx(weights / RATES["trellis"])
    assert seconds(source, layout, 8, None, scheme="trellis") == pytest.approx(weights / RATES["grid"])


@pytest.mark.parametrize("columns", [64, 2048, 14336, 1 << 20])
def test_parts_hold_enough_tiles_for_the_search(columns: int) -> None:
    assert part_rows(columns, 16) % 16 == 0
    assert part_rows(columns, 16) >= 16 * TILES
    assert part_rows(columns) == 4 * max(1, (1 << 17) // columns)
