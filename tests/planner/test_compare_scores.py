"""What a comparison says of one model: windows of a text, and summaries of values per token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.calibration.decoder import Decoder
from planner.checkpoint import SourceModel
from planner.comparison.scores import score, summarize, windows
from planner.layout import read_layout

MIXTRAL = Path(__file__).parents[2] / "benchmarks" / "models" / "stdlib-mixtral"


@given(count=st.integers(2, 60), length=st.integers(1, 20))
def test_windows_predict_every_token_but_the_first_once(count: int, length: int) -> None:
    inputs, targets = windows(list(range(1, count + 1)), length)
    assert inputs.shape == targets.shape == (-(-(count - 1) // length), length)
    known = targets >= 0
    assert targets[known].tolist() == list(range(2, count + 1))
    assert torch.equal(inputs[known], targets[known] - 1)
    assert not bool(inputs[~known].any())
    assert known.flatten().tolist() == sorted(known.flatten().tolist(), reverse=True)  # only the end is filled up
    assert bool(known.any(dim=1).all())


@pytest.mark.parametrize("seed", range(3))
def test_summaries_are_those_of_numpy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss, divergence = (torch.rand(7, 30, generator=generator) * scale for scale in (5, 0.3))
    same, known = torch.rand(7, 30, generator=generator) > 0.3, torch.ones(7, 30, dtype=torch.bool)
    known[-1, 11:] = False
    loss[~known] = divergence[~known] = 100.0  # must not count
    found = summarize(loss, divergence, same, known)
    mask = known.numpy()
    losses, divergences = (value.double().numpy()[mask] for value in (loss, divergence))
    assert found.tokens == len(losses) == 191
    assert found.perplexity == pytest.approx(np.exp(losses.mean()))
    assert found.kl == pytest.approx(divergences.mean())
    assert found.kl_99 == pytest.approx(np.quantile(divergences, 0.99))
    assert found.kl_median == pytest.approx(np.median(divergences))
    assert found.kl_max == pytest.approx(divergences.max())
    assert found.same_top == pytest.approx(same.numpy()[mask].mean())
    for error, value in ((found.kl_error, divergence), (found.perplexity_error / found.perplexity, loss)):
        assert error == pytest.approx(linear_error(value.double().numpy(), mask), rel=0.25)


def linear_error(values: np.ndarray, known: np.ndarray) -> float:
    """Return the standard error of the mean over tokens, sequences being independent, without resampling."""
    counts = known.sum(axis=1)
    sums = np.where(known, values, 0).sum(axis=1)
    residuals = sums - counts * sums.sum() / counts.sum()
    return float(np.sqrt((residuals**2).sum()) / counts.sum())


def test_one_sequence_has_no_error() -> None:
    values = torch.tensor([[0.5, 0.25, 1.0]])
    found = summarize(values, values, values > 0, values >= 0)
    assert (found.kl_error, found.perplexity_error) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_a_model_does_not_diverge_from_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 20, 128, generator=generator)
    other = states + 0.1 * torch.randn(3, 20, 128, generator=generator)
    targets = torch.randint(2048, (3, 20), generator=generator)
    targets[2, 5:] = -1
    with SourceModel(MIXTRAL) as model:
        decoder = Decoder(model, read_layout(model), torch.device("cpu"), torch.float32)
        itself, changed = score(decoder, states, torch.stack((states, other)), targets)
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
