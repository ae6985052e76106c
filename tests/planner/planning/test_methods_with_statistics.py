"""Methods that use what a calibration run has counted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planner.calibration.collect import StatisticsRequest, collect
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.conftest import Outcome, one_line
from tests.paths import CALIBRATION_TEXT, MIXTRAL, QWEN

CPU = torch.device("cpu")
Run = Callable[..., Outcome]


class TestMethodsThatUseStatistics:
    @pytest.fixture(scope="class")
    def stats(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder, source = tmp_path_factory.mktemp("stats"), MIXTRAL
        text = calibration_text(source, str(CALIBRATION_TEXT), 4, 128, 0)
        with SourceModel(source) as model:
            layout = read_layout(model)
            output, quiet = folder / "s.safetensors", Progress(quiet=True)
            collect(
                model,
                layout,
                text,
                output,
                {},
                CPU,
                torch.float32,
                quiet,
                wanted=StatisticsRequest(("error",), (1, 2, 3)),
            )
        return folder / "s.safetensors"

    @pytest.mark.parametrize(("method", "metric"), [("frequency", "tokens"), ("weight", "gate_probability")])
    def test_most_used_first(self, stats: Path, moeq: Run, method: str, metric: str) -> None:
        flags = ("--method", method, "--stats", stats, "--avg-bits", 2.5, "--json")
        found = moeq("plan", MIXTRAL, *flags)
        assert found.code == 0, found.err
        plan = json.loads(found.out)
        for prefix, order in plan["order"].items():
            values = plan["scores"][prefix][metric]
            assert order == sorted(range(8), key=lambda expert: -values[expert])
        assert "note:" not in found.err

    @pytest.mark.parametrize("average", [1, 1.125, 2, 2.5])
    @pytest.mark.parametrize("ranking", ["layer", "global"])
    def test_pmq_is_the_cheapest_choice(self, stats: Path, moeq: Run, average: float, ranking: str) -> None:
        source = MIXTRAL
        flags = ("--method", "pmq", "--stats", stats, "--avg-bits", average, "--ranking", ranking, "--json")
        found = moeq("plan", source, *flags)
        assert found.code == 0, found.err
        plan = json.loads(found.out)
        assert plan["achieved_avg_bits"] <= average
        if average >= 2 and ranking == "layer":
            assert all({2, 3} <= set(widths) for widths in plan["experts"].values())
        prefix = "model.layers.1.block_sparse_moe.experts"
        scores, widths = plan["scores"][prefix], plan["experts"][prefix]

        def cost(expert: int, bits: int) -> float:
            share = scores["tokens"][expert] / sum(scores["tokens"])
            weight = scores["gate_probability"][expert] / sum(scores["gate_probability"])
            return float(share * weight**1.5 * scores[f"error_{bits}"][expert])

        total = sum(cost(expert, bits) for expert, bits in enumerate(widths))
        for one, two in itertools.permutations(range(8), 2):  # no exchange of widths costs less
            swapped = [*widths]
            swapped[one], swapped[two] = swapped[two], swapped[one]
            assert total <= sum(cost(expert, bits) for expert, bits in enumerate(swapped)) * (1 + 1e-9)

    def test_pmq_keeps_overrides(self, stats: Path, moeq: Run, tmp_path: Path) -> None:
        prefix = "model.layers.2.block_sparse_moe.experts"
        (tmp_path / "fixed.json").write_text(json.dumps({f"{prefix}.{expert}": 3 for expert in (0, 6)}))
        flags = ("--method", "pmq", "--stats", stats, "--avg-bits", 2, "--overrides", tmp_path / "fixed.json", "--json")
        plan = json.loads(moeq("plan", MIXTRAL, *flags).out)
        assert plan["experts"][prefix][0] == plan["experts"][prefix][6] == 3
        assert sum(plan["experts"][prefix]) <= 16

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--method", "frequency"), "or --stats FILE of moeq calibrate"),
            (("--method", "pmq", "--bits", "2,4", "--stats", "STATS"), "moeq calibrate --for pmq --bits 2,4"),
            (("--method", "max-var", "--stats", "STATS"), "--stats: expected a method that reads it (kl,"),
            (("--method", "weight", "--stats", "nothing.safetensors"), "--stats: nothing.safetensors: expected a file"),
        ],
    )
    def test_refusals(self, stats: Path, moeq: Run, flags: tuple[str, ...], message: str) -> None:
        found = moeq("plan", MIXTRAL, *(str(stats) if flag == "STATS" else flag for flag in flags))
        assert (found.code, message in found.err) == (2, True), found.err

    def test_statistics_of_another_model_are_refused(self, stats: Path, moeq: Run) -> None:
        found = moeq("plan", QWEN, "--method", "weight", "--stats", stats)
        assert one_line(found).endswith(" is missing: the statistics are those of another model")
