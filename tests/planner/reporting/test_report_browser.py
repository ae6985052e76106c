"""The report as people see it: what a real browser draws, 1280 pixels wide, light and dark."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from planner.common.units import size
from planner.reporting.facts import collect
from tests.planner.reporting.browser import MARKS, Page
from tests.shipped import MIXTRAL_SIZES

pytestmark = MARKS

SCHEMES = ("light", "dark")
WIDE = 1280


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
def test_the_screenshot_shows_the_map(page: Page, report: Path, scheme: str) -> None:
    """Cell by cell the pixels have the colour of their width, and digits are drawn on them."""
    page.open(report, scheme, WIDE)
    pixels = picture(page)
    assert pixels.shape[1] == WIDE
    corner = pixels[2, 2].mean()
    assert corner > 240 if scheme == "light" else corner < 40
    at = page.run(
        "(() => { const box = document.querySelector('.map .cells').getBoundingClientRect();"
        "return {width: box.width, height: box.height, x: box.left, y: box.top + scrollY}; })()"
    )
    fills = {
        bits: page.run(f"getComputedStyle(document.querySelector('.cells .b{bits}')).fill.match(/\\d+/g).map(Number)")
        for bits in (1, 3)
    }
    width, height = int(at["width"] / MIXTRAL_SIZES.experts), int(at["height"] / MIXTRAL_SIZES.layers)
    for row, layer in enumerate(collect(report.parent).layers):
        for expert, bits in enumerate(layer.widths):
            left, top = round(at["x"]) + expert * width, round(at["y"]) + row * height
            cell = pixels[top + 2 : top + height - 2, left + 2 : left + width - 2]
            filled = (cell == fills[bits]).all(axis=2).mean()
            assert 0.6 < filled < 0.99, (row, expert, filled)
            marked = (cell[:5, :5] == fills[bits]).all(axis=2).mean() < 0.7
            assert marked == (expert in layer.promoted), (row, expert)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_legend_names_what_is_drawn(page: Page, report: Path, scheme: str) -> None:
    page.open(report, scheme)
    keys = page.run("[...document.querySelectorAll('.key li')].map(it => it.textContent)")
    facts, every = collect(report.parent), MIXTRAL_SIZES.all_experts
    counts = {"1 bit": facts.widths[1], "3 bits": facts.widths[3], "promoted by MaxVar": facts.num_promoted}
    assert keys == [f"{name} {count} ({count / every:.1%})" for name, count in counts.items()]
    assert all(counts.values())
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
    total, before = facts.sizes.total, facts.sizes.before
    sizes = (size(total), f"of {size(before)} in the source", f"{before / total:.2f}×")
    for text in (*sizes, "12.56", "nats per token", "‖W − Ŵ‖ / ‖W‖"):
        assert text in shown
    assert page.run("[...document.querySelectorAll('.scale')].every(it => it.querySelectorAll('text').length === 3)")


def test_a_script_that_is_not_ours_does_not_run(page: Page, report: Path, tmp_path: Path) -> None:
    """The page's own policy refuses what an escape that somebody forgot would let in."""
    changed = tmp_path / "changed.html"
    changed.write_text(report.read_text().replace("</main>", "<script>document.title='taken'</script></main>", 1))
    page.open(changed, "light")
    assert page.run("document.title") != "taken"
    assert any("Content Security Policy" in problem for problem in page.problems)
