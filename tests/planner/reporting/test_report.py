"""``moeq report``: what the page, the pictures and the JSON say of real checkpoints, and of hostile ones."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.evaluation.record import Evaluations
from planner.model.source import SourceModel
from planner.reporting.facts import collect
from planner.reporting.page import render
from planner.reporting.palette import LIGHT
from planner.reporting.value_maps import collect_maps
from planner.sensitivity import max_variance, router_norm
from tests.architectures import TINY, build
from tests.conftest import Outcome, one_line, run_here
from tests.folders import contents
from tests.paths import MIXTRAL
from tests.planner.reporting.synthetic import EVALUATIONS
from tests.planner.reporting.test_report_figures import cells
from tests.shipped import MIXTRAL_SIZES, mixtral_gib
from vllm_moeq.format import verify

HOSTILE = """<img src=x onerror=alert(1)>"'&</script><script>alert(2)</script>`$(rm -rf ~)` | ]]>\u202e"""
Moeq = Callable[..., Outcome]
TOTAL = MIXTRAL_SIZES.all_experts
RULE = ("--zeta", 2, "--promotion", "stable", "--counts", "official", "--ranking", "global")
BUDGET = "of 2.5 bits"
"""Stands for a number of GiB that depends on the model."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped Mixtral by the paper's rule; not to be changed."""
    folder = tmp_path_factory.mktemp("reported") / "mixtral-2.5bit"
    flags = ("--avg-bits", 2.5, "--bits", "1,2,3", "--zeta", 1.3, "--quantizer", "rtn")
    run_here("quantize", MIXTRAL, *flags, "-o", folder)
    return folder


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / quantized.name))


class Texts(HTMLParser):
    """Elements, their attributes, and what people read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.blocks: list[str] = []
        self._open = ""
        self._block = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "pre":
            self.blocks.append("")
            self._block = True

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self._block = self._block and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._open not in ("style", "script"):
            self.text += f"{data}\n"
        if self._block:
            self.blocks[-1] += data


def test_the_page_shows_every_width_and_promotion(moeq: Moeq, copy: Path) -> None:
    outcome = moeq("report", copy)
    assert outcome.out.strip() == f"report: {copy / 'report.html'}"
    html, facts = (copy / "report.html").read_text(), collect(copy)
    assert cells(html)[0] == {f"b{bits}": count for bits, count in facts.widths.items()}
    assert facts.widths == {1: TOTAL // 4, 3: 3 * TOTAL // 4}
    plan = json.loads((copy / "plan.json").read_text())
    promoted = sum(map(len, plan["promoted"].values()))
    marks = re.search(r'<g class="promoted">(.*?)</g>', html)
    assert marks is not None
    assert promoted == facts.num_promoted == len(re.findall(r"z", marks[1])) > 0
    assert f"{promoted} ({promoted / TOTAL:.1%})" in html


def test_numbers_stand_in_the_cells_of_the_plan(moeq: Moeq, copy: Path) -> None:
    moeq("report", copy)
    html = (copy / "report.html").read_text()
    first = html[html.index('<svg class="numbers') :]
    found = re.findall(
        r'<text class="b(\d)-ink" x="([\d.]+)%" y="([\d.]+)">(\d)</text>', first[: first.index("</svg>")]
    )
    places = sorted((float(y), float(x), int(fill), int(text)) for fill, x, y, text in found)
    widths = [bits for layer in json.loads((copy / "plan.json").read_text())["experts"].values() for bits in layer]
    assert [(fill, text) for _, _, fill, text in places] == [(bits, bits) for bits in widths]


def test_router_norm_and_max_var_are_those_of_the_weights(quantized: Path) -> None:
    grids = {grid.key: grid.values for grid in collect_maps(collect(quantized)).known}
    with SourceModel(MIXTRAL) as model:
        gate = model.shards.load("model.layers.2.block_sparse_moe.gate.weight")
        assert grids["router_norm"][2] == tuple(router_norm(gate))
        weight = model.shards.load("model.layers.2.block_sparse_moe.experts.5.w1.weight")
    assert grids["max_var"][2][5] == max_variance(weight)
    report = json.loads((quantized / "quantization_report.json").read_text())
    errors = tuple(100 * entry["relative_error"] for entry in report["layers"][2]["experts"])
    assert grids["relative_error"][2] == errors


def test_what_is_not_known_is_left_out_with_the_way_to_get_it(moeq: Moeq, copy: Path) -> None:
    for name in ("plan.json", "quantization_report.json"):
        (copy / name).unlink()
    facts = json.loads(moeq("report", copy, "--no-png", "--json").out)
    assert facts["grids"].keys() == {"router_norm"}
    html = (copy / "report.html").read_text()
    assert "moeq report DIR --model SOURCE computes it" in html
    assert "moeq quantize --data TEXT counts them" in html
    with_source = json.loads(moeq("report", copy, "--no-png", "--json", "--model", MIXTRAL).out)
    before = json.loads(json.dumps(collect_maps(collect(copy)).known[0].values))
    assert with_source["grids"]["router_norm"] == before
    assert with_source["grids"].keys() == {"router_norm", "max_var"}


def test_max_var_of_the_source_is_that_of_the_plan(copy: Path) -> None:
    planned = {grid.key: grid.values for grid in collect_maps(collect(copy)).known}["max_var"]
    (copy / "plan.json").unlink()
    with SourceModel(MIXTRAL) as source:
        computed = {grid.key: grid.values for grid in collect_maps(collect(copy), source).known}["max_var"]
    assert computed == planned


def test_the_sizes_are_those_of_the_files(quantized: Path) -> None:
    sizes, summary = collect(quantized).sizes, verify(quantized)
    assert sizes.total == summary.total_bytes
    assert sum(part.bytes for part in sizes.parts[:3]) == summary.expert_bytes
    with SourceModel(MIXTRAL) as source:
        assert sizes.source == sizes.half_precision == source.stored_bytes


def test_the_command_makes_the_same_checkpoint(moeq: Moeq, copy: Path, tmp_path: Path) -> None:
    moeq("report", copy)
    command = shlex.split(Texts((copy / "report.html").read_text()).blocks[0])
    assert command[:3] == ["moeq", "quantize", "stdlib-mixtral"]
    again = tmp_path / "again"
    assert moeq("quantize", MIXTRAL, *command[3:-1], again).code == 0
    before = contents(copy)
    for name in ("report.html", "report-widths.png", "report-experts.png"):
        del before[name]
    assert contents(again) == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "uniform", "--avg-bits", 2, "--bits", "2,4", "--linear-bits", 8, "--group-size", 64),
        ("--method", "random", "--seed", 5, "--avg-bits", "2.25", "--zero-points", "integer", "--one-bit", "rtn"),
        ("--budget-gib", BUDGET, *RULE),
    ],
)
def test_the_command_knows_every_flag(moeq: Moeq, tmp_path: Path, flags: tuple[object, ...]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    flags = tuple(f"{mixtral_gib(2.5):.4f}" if flag == BUDGET else flag for flag in flags)
    assert moeq("quantize", MIXTRAL, "--quantizer", "rtn", *flags, "-o", one).code == 0
    moeq("report", one, "-o", tmp_path / "page.html", "--no-png")
    command = shlex.split(Texts((tmp_path / "page.html").read_text()).blocks[0])
    assert moeq("quantize", MIXTRAL, *command[3:-1], other).code == 0
    assert contents(one) == contents(other)


def test_a_plan_by_hand_is_named_as_a_file(quantized_mixtral: Path) -> None:
    page = Texts(render(collect(quantized_mixtral), collect_maps(collect(quantized_mixtral))))
    assert "--plan mixtral/plan.json --quantizer hqq --group-size 32" in page.blocks[0]


def test_evaluations_are_shown(moeq: Moeq, copy: Path) -> None:
    assert "Nothing has been measured yet" in render(collect(copy), collect_maps(collect(copy)))
    EVALUATIONS.write(copy)
    moeq("report", copy)
    page = Texts((copy / "report.html").read_text())
    for shown in ("12.56 ± 0.17", "12.23", "0.02980 ± 0.00070", "93.12 ± 0.10 %", "arc_easy", "0.2612 ± 0.0090"):
        assert shown in page.text
    assert page.blocks[4:6] == [
        "moeq eval mixtral-2.5bit --data held_out.txt --window 256 --reference stdlib-mixtral",
        "moeq eval mixtral-2.5bit --tasks arc_easy --backend vllm",
    ]


def test_the_page_stays_the_same_and_verify_passes(moeq: Moeq, copy: Path) -> None:
    assert moeq("report", copy).code == 0
    before = contents(copy)
    assert moeq("report", copy).code == 0
    assert contents(copy) == before
    assert moeq("verify", copy).code == 0


def test_the_page_loads_nothing_and_allows_its_own_script_only(moeq: Moeq, copy: Path) -> None:
    moeq("report", copy)
    html = (copy / "report.html").read_text()
    page = Texts(html)
    references = {
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    }
    assert references == {"data:,"}
    assert "url(" not in html
    assert "@import" not in html
    policy = next(it["content"] for tag, it in page.elements if tag == "meta" and "http-equiv" in it) or ""
    assert policy.startswith("default-src 'none'; ")
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_the_page_offers_nothing_that_needs_a_script_without_it(moeq: Moeq, copy: Path) -> None:
    """Buttons that copy, and stops of the Tab key, are the script's; its own text and buttons are hidden."""
    moeq("report", copy)
    html = (copy / "report.html").read_text()
    main, beside = html.split("</main>")
    assert "<button" not in main
    assert "tabindex" not in html
    assert '<p class="note" id="hint" hidden>' in main
    assert beside.startswith('<div id="tip" hidden>')


def test_a_hostile_checkpoint_is_only_text(moeq: Moeq, copy: Path) -> None:
    def edit(name: str, change: Callable[[Any], None]) -> None:
        value = json.loads((copy / name).read_text())
        change(value)
        (copy / name).write_text(json.dumps(value))

    def fill(report: Any) -> None:
        report["source"]["name"] = report["quantizer"] = HOSTILE
        report["layers"][0]["experts"][0]["fallback"] = HOSTILE
        report["calibration"] = {"data": HOSTILE, "sequences": 1, "seq_len": 1}

    edit("quantization_report.json", fill)
    edit("plan.json", lambda plan: plan.update(method=HOSTILE[:64]))
    edit("config.json", lambda config: config.update(model_type=HOSTILE))
    edit("config.json", lambda config: config["quantization_config"]["plan"].update(method=HOSTILE[:64]))
    text = EVALUATIONS.texts[0].model_copy(update={"data": HOSTILE, "reference": HOSTILE})
    task = EVALUATIONS.tasks[0].model_copy(update={"task": HOSTILE, "metric": HOSTILE})
    Evaluations(texts=[text], tasks=[task]).write(copy)
    hostile = copy.rename(copy.with_name("<b onclick=x>'\"&"))
    outcome = moeq("report", hostile)
    assert outcome.code == 0, outcome.err
    page = Texts((hostile / "report.html").read_text())
    assert "img" not in {tag for tag, _ in page.elements}
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "values"},
        {},
    ]
    assert not {name for _, attributes in page.elements for name in attributes if name.startswith("on")}
    assert page.text.count("<img src=x onerror=alert(1)>") > 5
    assert "\u202e" not in page.text, "nothing changes the direction of text"
    for block in page.blocks[:1]:
        words = shlex.split(block)
        assert words[2] == HOSTILE.replace("\u202e", "\ufffd"), "a shell reads the name as one word"


@pytest.mark.parametrize("name", ["gpt_oss", "switch_transformers", "qwen3_moe"])
def test_other_architectures(moeq: Moeq, tmp_path: Path, name: str) -> None:
    assert name in TINY
    source, folder = tmp_path / "source", tmp_path / "quantized"
    build(name, source)
    assert moeq("quantize", source, "-o", folder, "--group-size", 32, "--quantizer", "rtn").code == 0
    facts = json.loads(moeq("report", folder, "--no-png", "--json").out)
    assert {"router_norm", "max_var", "relative_error"} == facts["grids"].keys()
    html = (folder / "report.html").read_text()
    assert ("vLLM cannot serve it" in html) == (name != "qwen3_moe")


def test_pictures_lie_beside_the_page(moeq: Moeq, copy: Path, tmp_path: Path) -> None:
    from PIL import Image

    before = contents(copy)
    facts = json.loads(moeq("report", copy, "-o", tmp_path / "page.html", "--png", "--json").out)
    assert facts["pictures"] == [str(tmp_path / f"page-{name}.png") for name in ("widths", "experts")]
    assert contents(copy) == before
    with Image.open(tmp_path / "page-widths.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for bits, share in ((1, 8 / 32), (3, 24 / 32)):
        colour = [int(LIGHT.widths[bits][at : at + 2], 16) for at in (1, 3, 5)]
        drawn = (pixels == colour).all(axis=1).sum()
        both = sum(
            (pixels == [int(LIGHT.widths[b][at : at + 2], 16) for at in (1, 3, 5)]).all(axis=1).sum() for b in (1, 3)
        )
        assert drawn / both == pytest.approx(share, abs=0.05)


def test_without_matplotlib(moeq: Moeq, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = moeq("report", copy)
    assert (outcome.code, "no pictures: they need matplotlib, pip install '.[report]'" in outcome.err) == (0, True)
    assert list(copy.glob("*.png")) == []
    assert "--png: expected the package matplotlib, found none installed" in one_line(moeq("report", copy, "--png"))
