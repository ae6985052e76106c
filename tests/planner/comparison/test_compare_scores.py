"""What a comparison says of models that share a head."""

from __future__ import annotations

import pytest
import torch

from planner.calibration.reading.decoder import Decoder
from planner.comparison.scores import score
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.paths import MIXTRAL
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.format import CheckpointError


def test_a_model_does_not_diverge_from_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 20, MIXTRAL_SIZES.hidden, generator=generator)
    other = states + 0.1 * torch.randn(3, 20, MIXTRAL_SIZES.hidden, generator=generator)
    targets = torch.randint(MIXTRAL_SIZES.vocabulary, (3, 20), generator=generator)
    targets[2, 5:] = -1
    with SourceModel(MIXTRAL) as model:
        decoder = Decoder(model, read_layout(model), torch.device("cpu"), torch.float32)
        itself, changed = score(decoder, states, torch.stack((states, other)), targets, ("itself", "changed"))
        with decoder.head() as logits, torch.no_grad():
            likely = [logits(value).double().log_softmax(dim=-1) for value in (states, other)]
    assert (itself.kl, itself.kl_max, itself.same_top, itself.tokens) == (0.0, 0.0, 1.0, 45)
    known = targets >= 0
    divergence = (likely[0].exp() * (likely[0] - likely[1])).sum(dim=-1)[known]
    assert changed.kl == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert changed.kl_max == pytest.approx(float(divergence.max()), rel=1e-3)
    same = likely[0].argmax(dim=-1) == likely[1].argmax(dim=-1)
    assert changed.same_top == pytest.approx(float(same[known].double().mean()))
    for found, values in ((itself, likely[0]), (changed, likely[1])):
        loss = -values.gather(2, targets.clamp_min(0)[:, :, None])[:, :, 0][known]
        assert found.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-4)


def test_a_model_that_overflows_is_named() -> None:
    states = torch.ones(2, 1, 4, MIXTRAL_SIZES.hidden)
    states[1, 0, 2, 5] = torch.inf
    with SourceModel(MIXTRAL) as model:
        decoder = Decoder(model, read_layout(model), torch.device("cpu"), torch.float32)
        with pytest.raises(CheckpointError, match=r"^kl, 2 bits: its outputs on the text are not finite: .* found nan"):
            score(decoder, states[0], states, torch.ones(1, 4, dtype=torch.int64), ("original", "kl, 2 bits"))
