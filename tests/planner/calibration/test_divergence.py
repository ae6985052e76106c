"""The KL divergence that rounding single experts causes: measured, estimated, and by transformers in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from planner.calibration.collect import StatisticsRequest, collect
from planner.calibration.kl.measured import measure_divergence
from planner.calibration.reading.expert import ExpertWeights
from planner.calibration.reading.rounded import rounded
from planner.calibration.reading.text import calibration_text
from planner.calibration.statistics import LayerStatistics
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MODELS, SHIPPED
from tests.planner.calibration.layers import reading

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
QUIET = Progress(quiet=True)
WIDTHS = (1, 2, 3)
Statistics = dict[str, LayerStatistics]


def in_memory(folder: Path, tokens: torch.Tensor, variants: list[tuple[int, int, int]]) -> list[float]:
    """Return Σ KL(original ‖ model with one expert rounded) for each (layer, expert, bits), in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    found = []
    with torch.inference_mode():
        exact = model(input_ids=tokens).logits.log_softmax(dim=-1)
        for layer, expert, bits in variants:
            experts = model.model.layers[layer].mlp.experts
            fused = experts.gate_up_proj[expert], experts.down_proj[expert]
            before = [matrix.clone() for matrix in fused]
            gate, up = before[0].float().chunk(2)
            other = rounded(ExpertWeights((gate, up), before[1].float()), bits)
            fused[0].copy_(other.stacked())
            fused[1].copy_(other.down)
            changed = model(input_ids=tokens).logits.log_softmax(dim=-1)
            found.append(float((exact.exp() * (exact - changed)).sum()))
            for matrix, value in zip(fused, before, strict=True):
                matrix.copy_(value)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_one_rounded_expert_diverges_as_in_memory(name: str, tmp_path: Path) -> None:
    folder = MODELS / name
    tokens = calibration_text(folder, str(CALIBRATION_TEXT), 3, 96, 0).tokens
    with reading(folder, tokens, tmp_path) as read:
        decoder, store = read.decoder, read.store
        busiest = [seen.tokens.argsort(descending=True)[:2].tolist() for seen in read.observed]
        last = len(decoder) - 1
        wanted = {index: [(expert, bits) for expert in busiest[index] for bits in (1, 2)] for index in (0, last)}
        found = measure_divergence(decoder, store, 2, wanted, QUIET)
    variants = [(index, expert, bits) for index in wanted for expert, bits in wanted[index]]
    for (index, expert, bits), expected in zip(variants, in_memory(folder, tokens[:2], variants), strict=True):
        assert expected > 1e-3
        # One side computes in float32, and each divergence is a small difference; without AVX-512 it is 6e-4.
        assert found[index][expert, bits] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """What both measures say of 3,072 tokens."""
    folder, source = tmp_path_factory.mktemp("divergence"), MIXTRAL
    text = calibration_text(source, str(CALIBRATION_TEXT), 12, 256, 0)
    wanted = StatisticsRequest(("kl", "kl-estimated"), WIDTHS)
    with SourceModel(source) as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.calibration.measures.ESTIMATED_SHARE", 1)  # the same tokens for both
        layout, output = read_layout(model), folder / "s.safetensors"
        return collect(model, layout, text, output, {}, CPU, torch.float32, QUIET, wanted=wanted)


@pytest.mark.parametrize("name", ["kl", "kl_estimated"])
def test_more_bits_diverge_less(found: Statistics, name: str) -> None:
    busy = 0
    for layer in found.values():
        costs = torch.stack([layer.measured[f"{name}_{bits}"] for bits in WIDTHS])
        assert costs.shape == (3, 8)
        assert bool(costs.isfinite().all())
        assert bool((costs > 0).all())
        seen = layer.tokens > 0.05 * 3072
        busy += int(seen.sum())
        assert bool((costs[:2] > 2 * costs[2])[:, seen].all())  # rounding to nearest in 2 bits hardly beats signs
    assert busy >= 8
    totals = [sum(float(layer.measured[f"{name}_{bits}"].sum()) for layer in found.values()) for bits in WIDTHS]
    assert totals[0] > totals[1] > totals[2]


def test_estimated_and_measured_rank_experts_alike(found: Statistics) -> None:
    for bits in WIDTHS:
        measured, estimated = (
            torch.cat([layer.measured[f"{name}_{bits}"] for layer in found.values()]) for name in ("kl", "kl_estimated")
        )
        assert spearmanr(measured, estimated).statistic > 0.9
