"""What evaluation.json keeps."""

from __future__ import annotations

from planner.evaluation.record import Divergence, Evaluations, TextResult

KL = Divergence(mean=0.1, error=0.01, median=0.05, p99=1.0, max=2.0, same_top=0.9, same_top_error=0.01)


def read(perplexity: float, kl: Divergence | None = None, window: int = 512) -> TextResult:
    found = TextResult(
        data="t.txt", sha256="0" * 64, window=window, tokens=9, perplexity=perplexity, perplexity_error=0.1
    )
    return found if kl is None else found.model_copy(update={"kl": kl, "reference": "original"})


def test_reading_again_without_a_reference_keeps_the_divergence() -> None:
    (kept,) = Evaluations(texts=[read(12.5, KL)]).merged([read(12.5001)], []).texts
    assert (kept.perplexity, kept.kl, kept.reference) == (12.5001, KL, "original")


def test_another_result_replaces_the_older_one() -> None:
    (kept,) = Evaluations(texts=[read(12.5, KL)]).merged([read(13.0)], []).texts
    assert (kept.perplexity, kept.kl) == (13.0, None)


def test_other_windows_stand_beside() -> None:
    assert len(Evaluations(texts=[read(12.5, KL)]).merged([read(11.0, window=1024)], []).texts) == 2
