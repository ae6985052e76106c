"""Figures of the report: cells of any number, colours that anybody can tell apart, numbers and scales."""

from __future__ import annotations

import itertools
import math
import re
import sys
from typing import Any

import numpy as np
import pytest

from planner.reporting.geometry import AMPLE, Geometry
from planner.reporting.heatmap import _short
from planner.reporting.page import render
from planner.reporting.palette import DARK, LIGHT, contrast, ink_on
from planner.reporting.scale import STEPS, Scale, number, power_of_ten
from tests.planner.reporting.synthetic import synthetic


def cells(html: str) -> list[dict[str, int]]:
    """Return class → cells of every map, from its paths."""
    maps = re.findall(r'<svg class="cells".*?</svg>', html)
    paths = [re.findall(r'<path class="([bs]\d)" d="([^"]*)"', found) for found in maps]
    return [{name: sum(map(int, re.findall(r"h(\d+)v1", d))) for name, d in found} for found in paths]


@pytest.mark.parametrize(("layers", "experts"), [(58, 256), (61, 8), (2, 4)])
def test_a_page_of_any_size(layers: int, experts: int) -> None:
    facts, grids = synthetic(layers, experts)
    html = render(facts, grids)
    assert len(html.encode()) < 2_000_000
    maps = cells(html)
    assert [sum(found.values()) for found in maps] == [layers * experts] * 6
    widths = [int(width) for width in re.findall(r'<svg class="cells" width="(\d+)"', html)]
    labels = [int(width) for width in re.findall(r'<svg class="axis" aria-hidden="true" width="(\d+)"', html)]
    assert max(map(sum, zip(widths, labels, strict=True))) <= 1096
    for ticks in re.findall(r'<svg class="axis"[^>]*>(.*?)</svg>', html):
        down = [float(y) for y in re.findall(r'<text text-anchor="end" x="\d+" y="([\d.]+)">', ticks)]
        assert all(b - a >= 12 for a, b in itertools.pairwise(down))


@pytest.mark.parametrize("experts", [4, 8, 64, 100, 128, 256, 384, 4096])
@pytest.mark.parametrize("room", [338, 528, 1096])
def test_ticks_do_not_touch_in_any_window(experts: int, room: int) -> None:
    shape = Geometry.fit(experts, ["0", "47"], room, (44, 30), 900)
    ticks = shape.column_ticks()
    for window, shown in ((850, list(ticks)), (288, [expert for expert, where in ticks.items() if where != AMPLE])):
        assert shown[0] == 0
        cell = shape.shrunk(window)
        assert all((b - a) * cell >= 7 * len(str(experts - 1)) for a, b in itertools.pairwise(shown))


MACHADO = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""How colours look to the colour-blind, in linear sRGB (Machado et al., 2009)."""


def lab(colour: str, matrix: Any) -> Any:
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(np.array(matrix) @ linear, 0, 1) / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("sight", MACHADO)
def test_widths_differ_for_the_colour_blind(scheme: Any, sight: str) -> None:
    for one, other in itertools.combinations(scheme.widths.values(), 2):
        assert np.linalg.norm(lab(one, MACHADO[sight]) - lab(other, MACHADO[sight])) > 15, (one, other)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_text_can_be_read(scheme: Any) -> None:
    for fill in (*scheme.widths.values(), *scheme.steps, *scheme.parts):
        assert contrast(ink_on(fill), fill) >= 4.5
    for name in ("ink", "muted"):
        assert contrast(scheme.names[name], scheme.names["page"]) >= 4.5


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_steps_move_away_from_the_page(scheme: Any) -> None:
    away = [contrast(step, scheme.names["page"]) for step in scheme.steps]
    assert all(b > 1.1 * a for a, b in itertools.pairwise(away))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.345, "12.3"),
        (0.00123456, "0.00123"),
        (4083, "4\u202f083"),
        (1.5e-7, "1.50·10⁻⁷"),
        (-2.5, "-2.50"),
        (9.999e-5, "1.00·10⁻⁴"),
        (5e-324, "4.94·10⁻³²⁴"),
        (-1.7976931348623157e308, "-1.80·10³⁰⁸"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(94_969, "95.0k"), (9_999, "9\u202f999"), (123_456, "123k"), (2.5e6, "2.50M"), (0.0568, "0.057")],
)
def test_numbers_in_cells(value: float, text: str) -> None:
    assert _short(value) == text


def test_scales() -> None:
    even = Scale.of([1.0, 8.0])
    assert [even.step(value) for value in (1, 1.9, 2.1, 7.9, 8)] == [0, 0, 1, STEPS - 1, STEPS - 1]
    factors = Scale.of([0.0, 1.0, 1e7])
    assert factors.logarithmic
    assert [factors.step(value) for value in (0, 1, 5, 20, 1e7)] == [0, 0, 0, 1, STEPS - 1]
    assert Scale.of([3.0, 3.0]).step(3.0) == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_scales_of_extreme_values(count: int) -> None:
    """Nothing overflows, and what is shown of them divides by no zero."""
    extremes = [-sys.float_info.max, -1e300, -1.0, -5e-324, 0.0, 5e-324, 1e-310, 1.0, 1e300, sys.float_info.max]
    for values in itertools.combinations(extremes, count):
        scale = Scale.of(values)
        bounds, steps = scale.bounds(), [scale.step(value) for value in values]
        assert bounds == sorted(bounds)
        assert all(map(math.isfinite, bounds))
        assert steps == sorted(steps)
        assert set(steps) <= set(range(STEPS))
        factor = 10.0 ** power_of_ten(scale.high)
        assert all(number(bound / factor) for bound in bounds)
