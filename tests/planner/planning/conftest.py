"""The model that plans are made for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from planner.model.layout import Layout, read_layout
from planner.model.source import SourceModel
from tests.paths import MIXTRAL


@pytest.fixture(scope="module")
def source() -> Iterator[SourceModel]:
    with SourceModel(MIXTRAL) as model:
        yield model


@pytest.fixture(scope="module")
def layout(source: SourceModel) -> Layout:
    return read_layout(source)
