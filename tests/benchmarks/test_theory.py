"""The synthetic experiment: its routing and gradients against plain ones, its checks on doctored results, one run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.replication.theory import run as theory
from benchmarks.replication.theory.bits import quantized, smallest_widths, test_outputs
from benchmarks.replication.theory.checks import LemmaError, Run, check, violations
from benchmarks.replication.theory.model import Model, Setting, counted, draw, gates, pretrained, train_step

test_outputs.__test__ = False  # type: ignore[attr-defined]
pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = Setting(dim=32, experts=4, neurons=12, tokens=20, chosen=3, deviation=0.3, router_rate=0.1, batch=16)


def small(seed: int = 0, setting: Setting = SETTING) -> tuple[Model, Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return pretrained(setting, generator), *draw(setting, 0.3, setting.batch, generator), generator


def token_table(model: Model) -> Tensor:
    return torch.cat([model.vectors, -model.vectors[:2]])


def plain_output(router: Tensor, neurons: Tensor, signs: Tensor, x: Tensor, chosen: int) -> Tensor:
    """Return f(x) by equations 1 and 5: router [k, d], neurons [k, m, d], sequences [B, n, d]."""
    best = torch.einsum("kd,bnd->kbn", router, x).topk(chosen)
    tokens = x[torch.arange(len(x))[:, None], best.indices]
    hidden = torch.einsum("kmd,kbld->kblm", neurons, tokens).relu().sum(dim=-1)
    return torch.einsum("k,kbl,kbl->b", signs, best.values.softmax(dim=-1), hidden)


def test_an_expert_chooses_the_best_tokens_of_each_sequence() -> None:
    model, tokens, _, _ = small()
    for scores in model.scores():
        expected = torch.zeros(len(scores), len(tokens))
        for place, sequence in enumerate(tokens):
            best = scores[sequence].topk(SETTING.chosen)
            expected[:, place].index_add_(0, sequence[best.indices], best.values.softmax(dim=0))
        best, gate = gates(scores, counted(SETTING, tokens), SETTING.chosen)
        found = torch.zeros_like(expected)
        found[best] = gate
        torch.testing.assert_close(found, expected)


def test_too_few_candidates_are_not_the_end() -> None:
    model, tokens, _, _ = small()
    counts, scores = counted(SETTING, tokens), model.scores()[0]
    best, gate = gates(scores, counts, SETTING.chosen, candidates=2)
    assert len(best) == len(scores)
    few, few_gate = gates(scores, counts, SETTING.chosen, candidates=30)
    torch.testing.assert_close(few_gate, gate[: len(few)])


def test_a_step_is_that_of_autograd() -> None:
    model, tokens, labels, _ = small()
    router = (model.router @ model.vectors).requires_grad_()
    neurons = (model.neurons @ model.vectors).requires_grad_()
    output = plain_output(router, neurons, model.signs, token_table(model)[tokens], SETTING.chosen)
    (1 - labels * output).mean().backward()
    train_step(model, tokens, labels)
    assert router.grad is not None
    assert neurons.grad is not None
    assert float(router.grad.abs().max()) > 1e-3
    expected_router = router - SETTING.router_rate * router.grad
    expected_neurons = neurons - SETTING.expert_rate * neurons.grad
    torch.testing.assert_close(model.router @ model.vectors, expected_router.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.neurons @ model.vectors, expected_neurons.detach(), atol=1e-5, rtol=1e-4)


def test_data_and_alignment_are_those_of_section_4_2() -> None:
    setting = replace(SETTING, batch=4000)
    model, tokens, labels, _ = small(setting=setting)
    relevant = (tokens < 2) | (tokens >= setting.dim)
    assert bool((relevant.sum(dim=1) == 1).all())
    assert bool((relevant[:, 0]).all())
    assert torch.equal(labels, 1.0 - 2 * (tokens[:, 0] % setting.dim))
    assert float((tokens[:, 0] < 2).float().mean()) == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(model.vectors @ model.vectors.T, torch.eye(setting.dim), atol=1e-5, rtol=0)
    assert model.aligned.tolist() == [0, setting.dim, 1, setting.dim + 1]
    own = model.scores().gather(1, model.aligned[:, None])
    assert [int(row.sum()) for row in model.router[:, 2:] > own] == [setting.rank - 1] * 4


def test_quantization_is_equation_2() -> None:
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    step = (high - low) / 7
    zero = -torch.round(low / step) - 4  # eq. 2: codes from −4 to 3
    expected = step * (torch.round(weight / step + zero).clamp(-4, 3) - zero)
    away = (quantized(weight, 3) - expected).abs() > 2e-3  # scales are stored in half precision
    assert float(away.float().mean()) < 0.01
    wide = quantized(weight, 3, (-7.0, 7.0))
    assert len(wide.unique()) <= 8
    torch.testing.assert_close(wide / 2, torch.round(wide / 2), atol=1e-3, rtol=0)


def test_unquantized_outputs_are_the_model() -> None:
    model, _, _, generator = small()
    state = generator.get_state()
    full, by_width = test_outputs(model, False, generator)
    generator.set_state(state)
    halves = [draw(SETTING, alpha, full.shape[1] // 2, generator) for alpha in (0.0, 1.0)]
    tokens, labels = (torch.cat(parts) for parts in zip(*halves, strict=True))
    parts = (model.router @ model.vectors, model.neurons @ model.vectors, model.signs)
    expected = labels * plain_output(*parts, token_table(model)[tokens], SETTING.chosen)
    torch.testing.assert_close(full.sum(dim=0), expected, atol=1e-4, rtol=1e-4)
    assert float((by_width[7] - full).abs().max()) < float((by_width[1] - full).abs().max())


def test_an_untrained_model_needs_no_width() -> None:
    model, _, _, generator = small()
    bits = smallest_widths(model, torch.arange(4.0), False, generator)
    assert bits.full_error > 0.1
    assert bits.high is None
    assert bits.gap is None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("theory") / "results"
    assert theory.main(["--quick", "--seeds", "2", "--alphas", "0.1", "0.2", "--output", str(output)]) == 0
    return output


def test_a_run_writes_figures_numbers_and_tables(results: Path) -> None:
    for number in (4, 5, 6):
        assert (results / f"theory-figure{number}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((results / "theory.json").read_text())["runs"]
    assert [(row["alpha"], row["seed"]) for row in rows] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert all(row["ratio"] >= row["bound"] and not row["violations"] for row in rows)
    readme = (results / "README.md").read_text()
    assert "holds in 4 of 4 runs" in readme
    assert all(f"## Figure {number}" in readme for number in (4, 5, 6))


def run() -> Run:
    """Return a result that the lemma allows, with the experts of class 2 before those of class 1."""
    return Run(
        seed=7, alpha=0.2, steps=1, names=["o2", "-o2", "o1", "-o1"], own_before=[0.5] * 4, own=[1.0] * 4,
        opposite=[0.0] * 4, gate=[0.5] * 4, norm_change=[1.0, 2.0, 3.0, 4.0], activation=[10.0, 15.0, 20.0, 31.0],
        projection=[0.0] * 4, variance=[1.0] * 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("own", 2, 0.999, r"\(i\) expert 2 of o1: p of o1 is 0.9990"),
        ("opposite", 1, 0.01, r"\(i\) expert 1 of -o2: it chooses the negative"),
        ("norm_change", 1, 1.0, r"\(ii\) expert 1 of -o2 and expert 0 of o2"),
        ("norm_change", 3, float("nan"), r"\(ii\) expert 3 of -o1 and expert 2 of o1"),
        ("activation", 3, 29.9, r"\(iii\) expert 3 of -o1 and expert 2 of o1: ratio of activations 1.495, below 1.500"),
    ],
)
def test_each_statement_is_checked(field: str, place: int, value: float, message: str) -> None:
    check([run()])
    doctored = copy.deepcopy(run())
    getattr(doctored, field)[place] = value
    assert len(violations(doctored)) == 1
    with pytest.raises(LemmaError, match=f"seed 7, α 0.2: Lemma 4.3 {message}"):
        check([run(), doctored])


def test_a_violation_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without training nothing is as the lemma says; the results are written all the same."""
    monkeypatch.setattr(theory, "train", lambda *_: None)
    assert theory.main(["--quick", "--seeds", "1", "--alphas", "0.2", "--output", str(tmp_path)]) == 1
    assert "seed 0, α 0.2: Lemma 4.3 (i) expert" in capsys.readouterr().err
    assert "holds in 0 of 1 runs" in (tmp_path / "README.md").read_text()


def test_a_seed_decides_everything() -> None:
    setting = replace(theory.QUICK, duration=0.2)
    first, again, other = (theory.measure(setting, 0.2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0].activation != other[0].activation
