"""The report as people see it: a real browser, 1280 pixels wide, light and dark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from planner.reporting.facts import collect
from planner.reporting.page import render
from tests.conftest import run_here
from tests.planner.reporting.browser import Page, find_browser, open_browser
from tests.planner.reporting.synthetic import synthetic
from tests.planner.reporting.test_report import EVALUATIONS, MIXTRAL

BROWSER = find_browser()
NO_BROWSER = "no Chromium: make browser installs it where apt-get and root are"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)]

SCHEMES = ("light", "dark")
WIDE = 1280

CONTRASTS = """
(() => {
  const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = colour => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(colour).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const text of document.querySelectorAll('.numbers text')) {
    const fill = text.classList[0].replace('-ink', '');
    const cells = text.closest('svg').querySelector(`.cells path.${fill}`);
    const both = [text, cells].map(it => luminance(getComputedStyle(it).fill));
    const [low, high] = both.sort((a, b) => a - b);
    found.push((high + 0.05) / (low + 0.05));
  }
  return found;
})()
"""
"""Contrast of every number with the fill of its cell, as computed by the browser."""

CELLS = """
[...document.querySelectorAll('svg.map .cells')].map(map => [...map.querySelectorAll('path[class]')]
  .flatMap(path => [...path.getAttribute('d').matchAll(/h(\\d+)v1/g)])
  .reduce((sum, run) => sum + Number(run[1]), 0))
"""

CROWDED = """
[...document.querySelectorAll('svg.map')].flatMap(map => {
  const boxes = [...map.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3));
}).length
"""
"""Labels of maps that run into each other."""

OUTSIDE = """
[...document.querySelectorAll('main *')].filter(it => it.getBoundingClientRect().right > innerWidth + 1
  && !it.closest('.scroll')).map(it => it.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert BROWSER is not None
    with open_browser(BROWSER, tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the shipped Mixtral, evaluated."""
    folder = tmp_path_factory.mktemp("seen") / "mixtral-2.5bit"
    run_here("quantize", MIXTRAL, "--avg-bits", 2.5, "--bits", "1,2,3", "--quantizer", "rtn", "-o", folder)
    EVALUATIONS.write(folder)
    run_here("report", folder, "--no-png")
    return folder / "report.html"


def picture(page: Page) -> Any:
    """Return a screenshot, [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))


def colours(pixels: Any, box: dict[str, float]) -> set[tuple[int, ...]]:
    left, top, right, bottom = (round(box[side]) for side in ("left", "top", "right", "bottom"))
    return set(map(tuple, pixels[top:bottom, left:right].reshape(-1, 3).tolist()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_opens_without_network_or_errors(page: Page, report: Path, scheme: str) -> None:
    page.open(report, scheme)
    page.screenshot()
    assert [url for url in page.requests if not url.startswith("data:")] == [report.as_uri()]
    assert page.problems == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_number_can_be_read_on_its_cell(page: Page, report: Path, scheme: str) -> None:
    page.open(report, scheme)
    found = page.run(CONTRASTS)
    assert len(found) == 32 * 4, "widths, router norms, MaxVar, errors"
    assert min(found) >= 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_screenshot_shows_the_map(page: Page, report: Path, scheme: str) -> None:
    """Cell by cell the pixels have the colour of their width, and digits are drawn on them."""
    page.open(report, scheme, WIDE)
    pixels = picture(page)
    assert pixels.shape[1] == WIDE
    corner = pixels[2, 2].mean()
    assert corner > 240 if scheme == "light" else corner < 40
    at = page.run(
        "(() => { const map = document.querySelector('svg.map'), box = map.getBoundingClientRect();"
        "return {...map.dataset, x: box.left, y: box.top + scrollY}; })()"
    )
    fills = {
        bits: page.run(f"getComputedStyle(document.querySelector('.cells .b{bits}')).fill.match(/\\d+/g).map(Number)")
        for bits in (1, 3)
    }
    width, height = int(at["width"]), int(at["height"])
    for row, layer in enumerate(collect(report.parent).layers):
        for expert, bits in enumerate(layer.widths):
            left = round(at["x"]) + int(at["left"]) + expert * width
            top = round(at["y"]) + int(at["top"]) + row * height
            cell = pixels[top + 2 : top + height - 2, left + 2 : left + width - 2]
            filled = (cell == fills[bits]).all(axis=2).mean()
            assert 0.6 < filled < 0.99, (row, expert, filled)
            marked = (cell[:5, :5] == fills[bits]).all(axis=2).mean() < 0.7
            assert marked == (expert in layer.promoted), (row, expert)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_legend_names_what_is_drawn(page: Page, report: Path, scheme: str) -> None:
    page.open(report, scheme)
    keys = page.run("[...document.querySelectorAll('.key li')].map(it => it.textContent)")
    assert keys == ["1 bit 8 (25.0%)", "3 bits 24 (75.0%)", "promoted by MaxVar 6 (18.8%)"]
    pixels = picture(page)
    for index, drawn in enumerate(("b1", "b3")):
        box = page.run(
            f"(() => {{ const box = document.querySelectorAll('.key svg')[{index}].getBoundingClientRect();"
            "const top = box.top + scrollY, bottom = box.bottom + scrollY;"
            "return {left: box.left + 1, right: box.right - 1, top: top + 1, bottom: bottom - 1}; })()"
        )
        fill = page.run(f"getComputedStyle(document.querySelector('.cells .{drawn}')).fill.match(/\\d+/g).map(Number)")
        assert colours(pixels, box) == {tuple(fill)}
    shown = page.run("document.body.innerText")
    for text in ("2.15 MiB", "of 7.39 MiB in the source", "3.44×", "12.56", "nats per token", "‖W − Ŵ‖ / ‖W‖"):
        assert text in shown
    assert page.run("[...document.querySelectorAll('.scale')].every(it => it.querySelectorAll('text').length === 3)")


@pytest.mark.parametrize(("layers", "experts"), [(58, 256), (61, 8), (24, 64), (2, 4)])
def test_maps_of_any_size_fit(page: Page, tmp_path: Path, layers: int, experts: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(*synthetic(layers, experts)))
    page.open(path, "light", WIDE)
    assert page.run("document.documentElement.scrollWidth") == WIDE
    assert page.run(OUTSIDE) == []
    assert page.run(CELLS) == [layers * experts] * 6
    assert page.run(CROWDED) == 0
    assert page.run("[...document.querySelectorAll('.scroll')].every(it => it.scrollWidth <= it.clientWidth)")
    assert page.problems == []


@pytest.mark.parametrize("width", [1920, 760, 360])
def test_other_windows_scroll_within_the_figure_only(page: Page, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(*synthetic(12, 128)))
    page.open(path, "dark", width)
    assert page.run("document.documentElement.scrollWidth") == width


def test_the_pointer_shows_what_is_known_of_an_expert(page: Page, report: Path) -> None:
    page.open(report, "light")
    at = page.run(
        "(() => { const map = document.querySelector('svg.map'), box = map.getBoundingClientRect(), data = map.dataset;"
        "return [box.left + +data.left + 7.5 * data.width, box.top + +data.top + 0.5 * data.height]; })()"
    )
    assert page.run("document.getElementById('tip').hidden")
    page.move(*at)
    shown = page.run("document.getElementById('tip').innerText").splitlines()
    assert shown[0] == "layer 0, expert 7: 3 bits"
    assert shown[-1] == "promoted by MaxVar"
    assert [line.split("  ")[0] for line in shown[1:-1]] == ["Router norm", "MaxVar", "Error of weights"]
    assert not page.run("document.getElementById('tip').hidden")
    page.move(5, 5)
    assert page.run("document.getElementById('tip').hidden")


def test_a_script_that_is_not_ours_does_not_run(page: Page, report: Path, tmp_path: Path) -> None:
    """The page's own policy refuses what an escape that somebody forgot would let in."""
    changed = tmp_path / "changed.html"
    changed.write_text(report.read_text().replace("</main>", "<script>document.title='taken'</script></main>", 1))
    page.open(changed, "light")
    assert page.run("document.title") != "taken"
    assert any("Content Security Policy" in problem for problem in page.problems)
