"""The block score predictor: cosines, what it learns, and that it learns it again."""

from __future__ import annotations

import math

import pytest
import torch

from planner.calibration import block_score
from planner.calibration.block_score import block_cosine, train_predictor
from vllm_moeq.format import CheckpointError


def some_inputs(count: int, seed: int) -> torch.Tensor:
    """Channels of very different size and mean, as hidden states have."""
    drawn = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.logspace(-2, 2, 16) + torch.linspace(-50, 50, 16)


def smooth(inputs: torch.Tensor) -> torch.Tensor:
    """A function like a block's cosine: small, not linear, within −1 and 1."""
    drawn = (inputs - torch.linspace(-50, 50, 16)) / torch.logspace(-2, 2, 16)
    return 0.1 + 0.05 * torch.tanh(drawn[:, 0] + drawn[:, 5]) + 0.03 * torch.sin(drawn[:, 15])


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


class TestCosine:
    def test_values(self) -> None:
        inputs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [math.nan, 1.0]])
        outputs = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-3.0, -4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        found = block_cosine(inputs, outputs)
        expected = torch.tensor([1.0, 0.0, -1.0, math.sqrt(0.5), 0.0, math.nan])
        assert torch.allclose(found, expected, atol=1e-6, equal_nan=True)

    def test_half_precision_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs, outputs = (some_inputs(10, seed).bfloat16() for seed in (0, 1))
        whole = block_cosine(inputs, outputs)
        monkeypatch.setattr(block_score, "ROWS", 3)
        assert whole.dtype == torch.float32
        assert torch.equal(block_cosine(inputs, outputs), whole)
        assert float(block_cosine(inputs, inputs).min()) > 1 - 1e-6

    def test_no_tokens(self) -> None:
        assert block_cosine(torch.empty(0, 4), torch.empty(0, 4)).shape == (0,)

    @pytest.mark.parametrize("shape", [(3, 4), (2, 5), (2, 2, 4)])
    def test_other_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="expected inputs and outputs of one shape"):
            block_cosine(torch.ones(2, 4), torch.ones(shape))


class TestPredictor:
    def test_it_predicts_tokens_that_it_has_not_seen(self) -> None:
        known, unseen = some_inputs(4096, 0), some_inputs(2048, 1)
        predictor = train_predictor(known, smooth(known), 0)
        assert correlation(predictor(unseen), smooth(unseen)) > 0.9
        # Of tokens that score high, the mean is higher: the score is not just the mean of what was learned.
        high = unseen[smooth(unseen).argsort()[-512:]]
        assert predictor.score(unseen) == pytest.approx(float(smooth(unseen).mean()), abs=0.003)
        assert predictor.score(high) == pytest.approx(float(smooth(high).mean()), abs=0.01)

    def test_a_seed_gives_the_same_predictor(self) -> None:
        known = some_inputs(600, 0)
        torch.manual_seed(3)
        first = train_predictor(known, smooth(known), 0)
        state = torch.get_rng_state()
        with torch.inference_mode():  # as calibration may run
            again = train_predictor(known.clone(), smooth(known), 0)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first(known), again(known))
        assert first.score(known) != train_predictor(known, smooth(known), 1).score(known)

    def test_rows_that_are_not_finite_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = some_inputs(600, 0)
        cosines = smooth(known)
        damaged, missing = torch.full((3, 16), math.nan), torch.tensor([0.5, 0.5, 0.5])
        damaged[1, 1:], damaged[2] = 0.0, math.inf
        more = torch.cat([damaged, known[:100], known[:1], known[100:]])
        less = torch.cat([missing, cosines[:100], torch.tensor([math.nan]), cosines[100:]])
        monkeypatch.setattr(block_score, "ROWS", 1000)
        expected = train_predictor(known, cosines, 0)
        found = train_predictor(more, less, 0)
        assert torch.equal(found(known), expected(known))
        assert found.score(torch.cat([damaged, known])) == pytest.approx(expected.score(known), rel=1e-6)

    def test_a_long_text_is_drawn_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = some_inputs(2000, 0)
        monkeypatch.setattr(block_score, "ROWS", 700)
        predictor = train_predictor(known, smooth(known), 0)
        assert predictor.score(known) == pytest.approx(float(smooth(known).mean()), abs=0.01)

    @pytest.mark.parametrize("count", [1, 40])
    def test_cosines_that_are_all_the_same(self, count: int) -> None:
        known = torch.ones(count, 16)
        predictor = train_predictor(known.bfloat16(), torch.full((count,), 0.25), 0)
        assert predictor.score(known) == pytest.approx(0.25, abs=1e-3)

    def test_predictions_are_cosines(self) -> None:
        known = some_inputs(600, 0)
        predictor = train_predictor(known, smooth(known), 0)
        assert float(predictor(known * 1e6).abs().max()) <= 1

    @pytest.mark.parametrize("inputs", [torch.full((4, 16), math.nan), torch.empty(0, 16)])
    def test_nothing_to_learn_from(self, inputs: torch.Tensor) -> None:
        with pytest.raises(CheckpointError, match="expected finite inputs"):
            train_predictor(inputs, torch.zeros(len(inputs)), 0)
        predictor = train_predictor(some_inputs(8, 0), torch.zeros(8), 0)
        with pytest.raises(CheckpointError, match="expected finite inputs"):
            predictor.score(inputs)

    def test_other_numbers_of_tokens(self) -> None:
        with pytest.raises(ValueError, match="a cosine for each of 4 inputs"):
            train_predictor(torch.ones(4, 16), torch.ones(3), 0)
