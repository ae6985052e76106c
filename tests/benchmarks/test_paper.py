"""The paper's tables and figures on a shipped model, with little text and two averages: rows, plots, what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import planner
from benchmarks.replication.paper import run as paper
from benchmarks.replication.paper.common import Result, markdown_table
from benchmarks.replication.paper.tables import ABLATION, ZETAS
from tests.shipped import sizes_of

pytestmark = pytest.mark.slow

PARTS = ("figure2", "figure9", "figure10", "figure11", "table2", "table5")
MODEL = paper.SHIPPED[0]
SIZES = sizes_of(MODEL)
LAYERS, EXPERTS = SIZES.layers, SIZES.experts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("paper") / "results"
    flags = ["--quick", "--device", "cpu", "--output", str(output), "--parts", ",".join(PARTS)]
    assert paper.main(flags) == 0
    return output


def rows(results: Path, part: str) -> list[dict[str, Any]]:
    return json.loads((results / MODEL.name / f"{part}.json").read_text())["rows"]


def by_variance() -> dict[int, list[int]]:
    """Layer → experts by falling largest variance of a gate neuron, computed here."""
    tensors = load_file(MODEL / "model.safetensors")
    found = {}
    for layer in range(LAYERS):
        names = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(EXPERTS)]
        values = [float(tensors[name].double().var(dim=1, correction=0).max()) for name in names]
        found[layer] = sorted(range(EXPERTS), key=lambda expert: -values[expert])
    return found


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_written_and_gathered(results: Path, part: str) -> None:
    folder = results / MODEL.name
    stored = json.loads((folder / f"{part}.json").read_text())
    text, readme = (folder / f"{part}.md").read_text(), (results / "README.md").read_text()
    assert stored["title"] in text
    assert stored["title"] in readme
    assert all(line in readme for line in stored["lines"])
    assert len((folder / f"{part}.csv").read_text().splitlines()) >= len(stored["rows"]) > 0
    for image in stored["images"]:
        data = (folder / image).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5_000
        assert f"({MODEL.name}/{image})" in readme
    assert bool(stored["images"]) == (part in ("figure2", "figure9", "figure10"))


def test_the_ablation_has_every_method_at_every_average(results: Path) -> None:
    found = [
        (row["choices"], row["method"], row["average"]) for row in rows(results, "table2") if row["method"] in ABLATION
    ]
    wanted = [("2,3", 2.25), ("2,3", 2.5), ("1,2,3", 2.0), ("1,2,3", 2.5)]
    assert sorted(found) == sorted((choices, name, average) for choices, average in wanted for name in ABLATION)


def test_the_figure_has_every_rule(results: Path) -> None:
    found = {(row["method"], row["average"], row["seed"]) for row in rows(results, "figure2")[1:] if "seed" in row}
    rules = ["router norm", "router norm + MaxVar", "router norm change", "router norm change + MaxVar"]
    rules += ["frequency", "weight", "pmq", "kl"]
    wanted = {(rule, average, 0) for rule in rules for average in (2.25, 2.5)}
    wanted |= {("random", average, seed) for average in (2.25, 2.5) for seed in (0, 1)}
    assert found == wanted | {("uniform", 2.0, 0), ("uniform", 3.0, 0)}


def test_the_original_is_as_good_as_moeq_eval_finds_it(results: Path) -> None:
    window, tokens = paper.QUICK["window"], paper.QUICK["max_tokens"]
    found = planner.evaluate(MODEL, data=MODEL / "held_out.txt", window=window, max_tokens=tokens)
    assert rows(results, "figure2")[0]["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)


def test_zeta_of_one_is_the_order_by_maxvar_alone(results: Path) -> None:
    swept = {row["zeta"]: row for row in rows(results, "table5")}
    assert tuple(swept) == ZETAS
    alone = next(
        row
        for row in rows(results, "table2")
        if (row.get("choices"), row["method"], row["average"]) == ("1,2,3", "max-var", 2.0)
    )
    assert swept[1.0]["model"] == alone["model"]
    assert swept[1.0]["kl"] == alone["kl"]
    moved = [swept[zeta]["promoted"] for zeta in ZETAS]
    assert moved == sorted(moved, reverse=True)


def test_the_map_shows_the_variances(results: Path) -> None:
    found = rows(results, "figure9")
    assert len(found) == LAYERS * EXPERTS
    for layer, order in by_variance().items():
        mine = [row for row in found if row["layer"] == layer]
        assert sorted(range(EXPERTS), key=lambda expert: -mine[expert]["max_var"]) == order
        middle = sorted(row["max_var"] for row in mine)[EXPERTS // 2 - 1 : EXPERTS // 2 + 1]
        assert all(row["times_median"] == pytest.approx(2 * row["max_var"] / sum(middle)) for row in mine)


def test_activations_are_listed_by_rising_norm(results: Path) -> None:
    found = rows(results, "figure10")
    assert len(found) == LAYERS * EXPERTS
    for layer in range(LAYERS):
        mine = [row for row in found if row["layer"] == layer]
        norms = [row["router_norm"] for row in mine]
        router = load_file(MODEL / "model.safetensors")[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert norms == sorted(norms)
        assert norms == pytest.approx(sorted(router.float().norm(dim=1).tolist()))
        assert sum(row["tokens"] for row in mine) == SIZES.chosen * (paper.QUICK["max_tokens"] - 1)
        assert all((row["activation"] or 0) > 0 for row in mine if row["tokens"])


def test_tokens_are_shown_with_neighbours_and_visible_whitespace(results: Path) -> None:
    found = rows(results, "figure11")
    assert {row["norm"] for row in found} <= {"smallest", "second largest", "largest"}
    for row in found:
        assert row["context"].count("⟦") == row["context"].count("⟧") == 1
        assert not set(row["context"]) & set(" \n\t|`")
    gates = [row["gate"] for row in found if row["norm"] == "smallest"]
    assert gates == sorted(gates, reverse=True)
    assert len(gates) > 5


def test_a_finished_part_is_not_run_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def part(_bench: object) -> Result:
        ran.append("figure9")
        return Result("", [], [])

    monkeypatch.setitem(paper.PARTS, "figure9", part)
    flags = ["--quick", "--device", "cpu", "--output", str(results), "--parts", "figure9"]
    before = (results / MODEL.name / "figure9.json").read_text()
    assert paper.main(flags) == 0
    assert ran == []
    assert (results / MODEL.name / "figure9.json").read_text() == before
    folder = results.with_name("other")
    other = [str(folder) if flag == str(results) else flag for flag in flags]
    assert paper.main([*other, "--max-tokens", "512"]) == 0
    assert paper.main([*other, "--max-tokens", "1024"]) == 0
    assert ran == ["figure9"] * 2


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper.main(["--output", str(tmp_path), "--parts", "table9"])
    assert "table9" in capsys.readouterr().err


def test_tables_are_markdown() -> None:
    assert markdown_table(["a", "b"], [[1, "x"]]) == ["| a | b |", "| --- | --- |", "| 1 | x |"]
