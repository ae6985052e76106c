"""The report in windows from a phone's to a large one: nothing is clipped, nothing is too small or too pale to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.reporting.page import render
from tests.planner.reporting.browser import MARKS, Page
from tests.planner.reporting.synthetic import synthetic

pytestmark = MARKS

WIDTHS = (320, 360, 500, 800, 900, 1280, 1920)
AA = 4.5
"""WCAG's least contrast of text."""

TAP, POINT = 44, 24
"""Least height of what a finger and a pointer press, in pixels; WCAG asks for 24."""

TEXTS = """
const shown = it => it.checkVisibility() && !it.closest('.unseen, script, style, title');
const texts = () => {
  const walk = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) found.push(walk.currentNode);
  return found.filter(text => text.data.trim() && shown(text.parentElement));
};
"""

OUTSIDE = """
[...document.querySelectorAll('main *')].filter(it => shown(it) && it.getBoundingClientRect().right > innerWidth + 1)
  .map(it => it.outerHTML.slice(0, 80))
"""

CLIPPED = """
[...document.querySelectorAll('main *')].filter(it => shown(it) && it.clientWidth && it.scrollWidth > it.clientWidth + 1
  && getComputedStyle(it).overflowX !== 'visible').map(it => it.outerHTML.slice(0, 80))
"""
"""What hides a part of itself, or wants to be scrolled."""

CROWDED = """
[...document.querySelectorAll('.map')].flatMap(map => {
  const boxes = [...map.querySelectorAll('text')].filter(shown).map(text => text.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3));
}).length
"""
"""Labels of maps that run into each other."""

TINY = """
texts().map(text => {
  const style = getComputedStyle(text.parentElement), matrix = text.parentElement.getScreenCTM?.();
  return [parseFloat(style.fontSize) * (matrix ? Math.hypot(matrix.a, matrix.b) : 1), text.data.slice(0, 40)];
}).filter(([size]) => size < 10)
"""
"""Text under ten pixels, with the scale of the picture that it is in."""

TORN = """
texts().flatMap(text => [...text.data.matchAll(/(?<!\\S)[^\\s-]{1,12}(?!\\S)/g)].filter(word => {
  const range = document.createRange();
  range.setStart(text, word.index);
  range.setEnd(text, word.index + word[0].length);
  return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1;
}).map(word => word[0]))
"""
"""Short words that are broken between two lines."""

PALE = """
(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(colour).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = it => {
    const fill = [...it.classList].find(name => name.endsWith('-ink'))?.replace('-ink', '');
    if (fill) return getComputedStyle(it.closest('.grid, .bar').querySelector(`.${fill}`)).fill;
    for (; it; it = it.parentElement) {
      const colour = getComputedStyle(it).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
  };
  return texts().map(text => {
    const it = text.parentElement, style = getComputedStyle(it);
    const pair = [it instanceof SVGElement ? style.fill : style.color, behind(it)].map(luminance);
    const [low, high] = pair.sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), text.data.slice(0, 40)];
  });
})()
"""
"""Contrast of every text with what is behind it, as computed by the browser."""

PRESSED = """
[...document.querySelectorAll('main button, summary')].map(it => it.getBoundingClientRect().height)
"""

CELLS = """
[...document.querySelectorAll('.map .cells')].map(map => [...map.querySelectorAll(':scope > path[class]')]
  .flatMap(path => [...path.getAttribute('d').matchAll(/h(\\d+)v1/g)])
  .reduce((sum, run) => sum + Number(run[1]), 0))
"""


def probe(page: Page, script: str) -> object:
    """Return the value of an expression that reads the page's texts."""
    return page.run(f"(() => {{ {TEXTS} return {script.strip()}; }})()")


def check_layout(page: Page, width: int) -> None:
    assert page.run("document.documentElement.scrollWidth") == width
    assert {name: probe(page, script) for name, script in LAYOUT.items()} == {name: [] for name in LAYOUT}
    assert probe(page, CROWDED) == 0
    assert page.problems == []


LAYOUT = {"outside": OUTSIDE, "clipped": CLIPPED, "tiny": TINY, "torn": TORN}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["report", "large_report"])
def test_nothing_is_clipped_or_unreadable(page: Page, request: pytest.FixtureRequest, which: str, width: int) -> None:
    page.open(request.getfixturevalue(which), "light", width)
    page.run("document.querySelectorAll('details').forEach(it => { it.open = true; })")
    check_layout(page, width)


@pytest.mark.parametrize(("layers", "experts"), [(58, 256), (61, 8), (24, 64), (2, 4)])
def test_maps_of_any_size_fit(page: Page, tmp_path: Path, layers: int, experts: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(*synthetic(layers, experts)))
    for width in (1280, 500):
        page.open(path, "light", width)
        check_layout(page, width)
        assert page.run(CELLS) == [layers * experts] * 6


def test_long_names_fit(page: Page, tmp_path: Path) -> None:
    facts, grids = synthetic(2, 4, "owner/" + "M" * 150)
    path = tmp_path / "report.html"
    path.write_text(render(facts, grids))
    for width in (1280, 360):
        page.open(path, "light", width)
        assert page.run("document.documentElement.scrollWidth") == width
        assert (probe(page, OUTSIDE), probe(page, CLIPPED)) == ([], [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_text_has_contrast(page: Page, report: Path, scheme: str, width: int) -> None:
    page.open(report, scheme, width)
    page.run("document.querySelectorAll('.command').forEach(it => it.querySelector('button').focus())")
    found = probe(page, PALE)
    assert isinstance(found, list)
    assert len(found) > 32 * 4, "widths, router norms, MaxVar, errors"
    assert [pair for pair in found if pair[0] < AA] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_systems_own_colours_have_contrast(page: Page, report: Path, scheme: str) -> None:
    """Where a system forces its colours, the page's texts take them, and the chosen cell can be seen."""
    page.open(report, scheme)
    features = {"prefers-color-scheme": scheme, "forced-colors": "active"}
    page.call("Emulation.setEmulatedMedia", features=[{"name": name, "value": features[name]} for name in features])
    found = probe(page, PALE)
    assert isinstance(found, list)
    assert [pair for pair in found if pair[0] < AA] == []
    page.press("Tab")
    assert page.run("getComputedStyle(document.getElementById('cursor')).outlineStyle") == "solid"


@pytest.mark.parametrize(("touch", "least"), [(True, TAP), (False, POINT)])
def test_what_is_pressed_is_large_enough(page: Page, large_report: Path, touch: bool, least: int) -> None:
    page.open(large_report, "light", 360, touch=touch)
    heights = page.run(PRESSED)
    assert len(heights) == 7, "the table of layers, and six commands"
    assert min(heights) >= least
