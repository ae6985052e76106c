"""The KL divergence that rounding linears outside the experts causes: measured, estimated, and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planner.calibration.kl.divergence import Effort
from planner.calibration.kl.linears import costs as costs_module
from planner.calibration.kl.linears.costs import linear_costs
from planner.calibration.kl.linears.estimated import estimate_linears
from planner.calibration.kl.linears.measured import measure_linears
from planner.calibration.kl.linears.rounding import rounded_group
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.model.linear_groups import LinearGroup, linear_groups
from planner.quantization.settings import default_linear
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MODELS, SHIPPED
from tests.planner.calibration.layers import Read, reading
from vllm_moeq.format import Linear

pytestmark = pytest.mark.slow

QUIET = Progress(quiet=True)
WIDTHS = (4, 8)


def formats(read: Read) -> list[Linear]:
    return [default_linear(read.decoder.model, read.decoder.layout, bits) for bits in WIDTHS]


def in_memory(folder: Path, tokens: torch.Tensor, rounded: list[dict[str, torch.Tensor]]) -> list[float]:
    """Return Σ KL(original ‖ model with some weights replaced) for each replacement, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    found = []
    with torch.inference_mode():
        exact = model(input_ids=tokens).logits.log_softmax(dim=-1)
        for values in rounded:
            before = {name: model.get_parameter(name).clone() for name in values}
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
            found.append(float((exact.exp() * (exact - model(input_ids=tokens).logits.log_softmax(dim=-1))).sum()))
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_a_rounded_group_diverges_as_in_memory(name: str, tmp_path: Path) -> None:
    folder = MODELS / name
    tokens = calibration_text(folder, str(CALIBRATION_TEXT), 3, 96, 0).tokens
    with reading(folder, tokens, tmp_path) as read:
        groups, four = linear_groups(read.decoder.layout), formats(read)[:1]
        tried = [groups[0], groups[-1]]
        found = measure_linears(read.decoder, read.store, 2, tried, four, QUIET)
        rounded = [rounded_group(read.decoder.model, group, four[0]) for group in tried]
    for group, expected in zip(tried, in_memory(folder, tokens[:2], rounded), strict=True):
        assert expected > 1e-3
        assert found[group][4] == pytest.approx(expected, rel=1e-3)


def test_estimates_are_near_the_measurements(tmp_path: Path) -> None:
    tokens = calibration_text(MIXTRAL, str(CALIBRATION_TEXT), 8, 128, 0).tokens
    with reading(MIXTRAL, tokens, tmp_path) as read:
        decoder, store, groups = read.decoder, read.store, linear_groups(read.decoder.layout)
        measured = measure_linears(decoder, store, 8, groups, formats(read), QUIET)
        estimated = estimate_linears(decoder, store, tokens, groups, formats(read), 0, QUIET)
    for bits, factor in ((4, 2.0), (8, 5.0)):
        exact, near = (sum(found[group][bits] for group in groups) for found in (measured, estimated))
        assert exact / factor < near < exact * factor
    for group in groups:
        assert measured[group][4] > 20 * measured[group][8]
        assert estimated[group][4] > 20 * estimated[group][8]


@pytest.mark.parametrize("enough", [True, False])
def test_effort_decides_whether_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: bool) -> None:
    tokens = calibration_text(MIXTRAL, str(CALIBRATION_TEXT), 4, 128, 0).tokens
    with reading(MIXTRAL, tokens, tmp_path) as read:
        groups = linear_groups(read.decoder.layout)
        needed = 4 * 128 * len(WIDTHS) * sum(len(read.decoder) - group.index for group in groups)
        other = "estimate_linears" if enough else "measure_linears"
        monkeypatch.setattr(costs_module, other, refuse)
        effort = Effort(4, 4 * 128, needed if enough else needed - 1)
        costs, measured = linear_costs(read.decoder, read.store, tokens, effort, 0, QUIET)
    assert measured == (len(groups) * len(WIDTHS) if enough else 0)
    assert set(costs) == {"4", "8", "gptq_4", "gptq_8"}
    for values in costs.values():
        assert values.shape == (len(groups),)
        assert bool((values > 0).all())
    assert bool((costs["gptq_4"] < costs["4"]).all())  # GPTQ changes the outputs less than rounding to nearest


def refuse(*_arguments: object) -> dict[LinearGroup, dict[int, float]]:
    raise AssertionError("expected the other way")
