"""What evaluation.json keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.api.results import Evaluated
from planner.commands.evaluate import print_found
from planner.evaluation.record import Divergence, Evaluations, TextResult, read_evaluations
from vllm_moeq.format import ConfigError

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


@pytest.mark.parametrize(
    ("key", "value"), [("perplexity", 0.5), ("perplexity_error", -1.0), ("reference_perplexity", -3.0)]
)
def test_impossible_numbers_are_refused(key: str, value: float, tmp_path: Path) -> None:
    record = {"texts": [read(12.5).model_dump(exclude_none=True) | {key: value}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"evaluation.json: texts.0.{key}: Input should be greater"):
        read_evaluations(tmp_path)


def test_other_windows_stand_beside() -> None:
    assert len(Evaluations(texts=[read(12.5, KL)]).merged([read(11.0, window=1024)], []).texts) == 2


def test_the_tail_is_recorded_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"reference_perplexity": 12.0, "reference_perplexity_error": 0.1}
    found = read(12.5, KL).model_copy(update=more)
    Evaluations(texts=[found]).write(tmp_path)
    (kept,) = read_evaluations(tmp_path).texts
    assert kept == found
    print_found(Evaluated("model", text=kept))
    printed = capsys.readouterr().out
    assert "KL divergence 0.10000 ± 0.01000 nats per token; median 0.05000, 99% 1.0000, largest 2.000" in printed


def test_a_result_without_a_reference_has_no_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Evaluations(texts=[read(12.5)]).write(tmp_path)
    (kept,) = read_evaluations(tmp_path).texts
    assert kept.kl is None
    print_found(Evaluated("model", text=kept))
    assert capsys.readouterr().out.splitlines() == ["perplexity 12.5000 ± 0.1000, 9 tokens of t.txt, windows of 512"]
