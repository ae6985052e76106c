"""What an evaluation says of one model: windows of a text, and summaries of values per token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.evaluation.scores import summarize, windows


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
    errors = (found.kl_error, found.same_top_error, found.perplexity_error / found.perplexity)
    for error, value in zip(errors, (divergence, same, loss), strict=True):
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
