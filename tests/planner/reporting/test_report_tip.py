"""What is known of an expert: by pointer, by finger and by keyboard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.reporting.facts import collect
from planner.reporting.page import render
from tests.planner.reporting.browser import MARKS, Page
from tests.planner.reporting.synthetic import synthetic
from tests.shipped import MIXTRAL_SIZES

pytestmark = MARKS

MAPS = 4
"""Widths, router norms, MaxVar, errors of weights."""

FIRST = "layer 0, expert 0: 3 bits"

FOCUSED = """
(() => {
  const it = document.activeElement;
  if (it === document.body) return 'body';
  return it.matches('.map') ? it.getAttribute('aria-label').split(':')[0] : it.textContent;
})()
"""

RING = """
[getComputedStyle(document.activeElement)].map(it => [it.outlineStyle, parseFloat(it.outlineWidth)])[0]
"""

BOXES = """
['tip', 'cursor'].map(id => document.getElementById(id).getBoundingClientRect())
  .map(({left, top, right, bottom}) => ({left, top, right, bottom}))
"""


def tip(page: Page) -> list[str] | None:
    """Return the lines of the text that is shown; None while it is hidden."""
    found = page.run("document.getElementById('tip').hidden ? null : document.getElementById('what').textContent")
    return None if found is None else str(found).splitlines()


def place(page: Page, layer: int, expert: int, number: int = 0) -> tuple[float, float]:
    """Return the middle of a cell of the small report, after its map was scrolled into the window."""
    x, y = page.run(
        f"(() => {{ const map = document.querySelectorAll('.map .cells')[{number}]; map.scrollIntoView(false);"
        "const box = map.getBoundingClientRect();"
        f"return [box.left + {expert + 0.5} * box.width / {MIXTRAL_SIZES.experts}, "
        f"box.top + {layer + 0.5} * box.height / {MIXTRAL_SIZES.layers}]; }})()"
    )
    return x, y


def check_beside(page: Page, width: int, height: int) -> None:
    """Check that the text lies in the window, and not on the chosen cell."""
    text, cell = page.run(BOXES)
    assert 0 <= text["left"] < text["right"] <= width
    assert 0 <= text["top"] < text["bottom"] <= height
    assert 0 <= cell["top"] < cell["bottom"] <= height
    assert text["top"] >= cell["bottom"] or text["bottom"] <= cell["top"]


def tab_to_map(page: Page) -> None:
    page.press("Tab")
    assert page.run(FOCUSED) == "Bits per expert"


def test_the_pointer_shows_what_is_known_of_an_expert(page: Page, report: Path) -> None:
    page.open(report, "light")
    at = place(page, 0, 7)
    assert tip(page) is None
    page.move(*at)
    shown = tip(page)
    assert shown is not None
    assert shown[0] == "layer 0, expert 7: 3 bits"
    assert shown[-1] == "promoted by MaxVar"
    assert [line.split("  ")[0] for line in shown[1:-1]] == ["Router norm", "MaxVar", "Error of weights"]
    page.move(5, 5)
    assert tip(page) is None
    page.move(*at)
    page.press("Escape")
    assert tip(page) is None


def test_schemes_stand_beside_widths_where_not_all_are_grids(page: Page, tmp_path: Path) -> None:
    facts, grids = synthetic(4, 8)
    layers = [
        replace(layer, schemes=tuple("grid" if bits == 8 else "trellis" for bits in layer.widths))
        for layer in facts.layers
    ]
    path = tmp_path / "report.html"
    path.write_text(render(replace(facts, layers=tuple(layers)), grids))
    page.open(path, "light")
    for expert, (bits, scheme) in enumerate(zip(layers[0].widths, layers[0].schemes, strict=True)):
        page.move(*place(page, 0, expert))
        shown = tip(page)
        assert shown is not None
        assert shown[0] == f"layer 0, expert {expert}: {bits} bit{'s' if bits > 1 else ''}, {scheme}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tab_reaches_every_map_and_button(page: Page, report: Path, scheme: str) -> None:
    page.open(report, scheme, 500)
    stops = []
    for _ in range(20):
        page.press("Tab")
        stops.append(page.run(FOCUSED))
        if stops[-1] == "body":
            break
        assert page.run(RING) == ["solid", 2]
        assert (tip(page) is not None) == (len(stops) <= MAPS)
    assert stops == ["Bits per expert", "Router norm", "MaxVar", "Error of weights", *["Copy"] * 7, "body"]


def test_keys_go_from_cell_to_cell(page: Page, report: Path) -> None:
    last = MIXTRAL_SIZES.layers - 1
    page.open(report, "light")
    tab_to_map(page)
    assert tip(page)[:1] == [FIRST]  # type: ignore[index]
    for key, layer, expert in (
        ("ArrowRight", 0, 1), ("ArrowDown", 1, 1), ("ArrowLeft", 1, 0), ("ArrowLeft", 1, 0), ("End", 1, 7),
        ("ArrowRight", 1, 7), ("PageDown", last, 7), ("ArrowDown", last, 7), ("Home", last, 0), ("PageUp", 0, 0),
        ("ArrowUp", 0, 0), ("End", 0, 7),
    ):  # fmt: skip
        page.press(key)
        shown = tip(page)
        assert shown is not None
        assert shown[0].startswith(f"layer {layer}, expert {expert}: "), key
        assert page.run("document.getElementById('said').textContent").splitlines() == shown
    page.press("Tab")
    assert page.run(FOCUSED) == "Router norm"
    assert tip(page)[0].startswith("layer 0, expert 7: ")  # type: ignore[index]
    page.press("Escape")
    assert tip(page) is None
    assert page.run(FOCUSED) == "Router norm"
    page.press("ArrowLeft")
    assert tip(page)[0].startswith("layer 0, expert 6: ")  # type: ignore[index]
    page.press("Tab", shift=True)
    assert page.run(FOCUSED) == "Bits per expert"
    page.press("Tab", shift=True)
    assert tip(page) is None


@pytest.mark.parametrize("size", [(360, 640), (1280, 900)])
def test_the_chosen_cell_stays_in_sight(page: Page, large_report: Path, size: tuple[int, int]) -> None:
    page.open(large_report, "light", *size)
    tab_to_map(page)
    for key in ("End", "PageDown", "ArrowUp", "Home", "PageUp", *["ArrowDown"] * 30):
        page.press(key)
        check_beside(page, *size)
    assert tip(page)[0].startswith("layer 30, expert 0: ")  # type: ignore[index]


def test_a_pointer_at_rest_does_not_take_part(page: Page, large_report: Path) -> None:
    """The map scrolls under it while keys are pressed."""
    page.open(large_report, "light")
    tab_to_map(page)
    page.move(400, 600)
    page.press("Home")
    page.press("PageUp")
    for layer in range(1, 48):
        page.press("ArrowDown")
        assert tip(page)[0].startswith(f"layer {layer}, expert 0: ")  # type: ignore[index]
    assert page.run("scrollY") > 0


def test_a_finger_chooses_and_steps(page: Page, report: Path) -> None:
    page.open(report, "light", 360, 640, touch=True)
    page.tap(*place(page, 1, 5))
    bits = collect(report.parent).layers[1].widths[5]
    assert tip(page)[0] == f"layer 1, expert 5: {bits} bit{'s' if bits > 1 else ''}"  # type: ignore[index]
    check_beside(page, 360, 640)
    for key, layer, expert in (("ArrowRight", 1, 6), ("ArrowDown", 2, 6), ("ArrowLeft", 2, 5), ("ArrowUp", 1, 5)):
        box = page.run(
            f"(() => {{ const box = document.querySelector('[data-key={key}]').getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]; })()"
        )
        assert min(box[2:]) >= 44
        page.tap(box[0] + box[2] / 2, box[1] + box[3] / 2)
        assert tip(page)[0].startswith(f"layer {layer}, expert {expert}: ")  # type: ignore[index]
    page.tap(355, 320)
    assert tip(page) is None


CLIPBOARDS = {
    "as it is": "undefined",
    "missing": "Object.defineProperty(navigator, 'clipboard', {value: undefined})",
    "refused": "Object.defineProperty(navigator, 'clipboard', {value: {writeText: () => Promise.reject('no')}})",
}


@pytest.mark.parametrize("clipboard", CLIPBOARDS)
def test_commands_are_copied(page: Page, report: Path, clipboard: str) -> None:
    page.open(report, "light", 500)
    page.run(f"void {CLIPBOARDS[clipboard]}")
    commands: list[Any] = page.run("[...document.querySelectorAll('.command pre')].map(it => it.textContent)")
    assert commands[1] == "moeq serve mixtral-2.5bit"
    for number in (0, 3):
        page.run(f"document.querySelectorAll('.command button')[{number}].focus()")
        page.press("Enter")
        page.wait_for(f"{FOCUSED.strip()} === 'Copied'")
        assert page.run("document.getElementById('said').textContent") == "Copied"
        assert page.pasted() == commands[number]
    assert page.problems == []
