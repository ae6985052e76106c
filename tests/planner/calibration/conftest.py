"""The models that calibration is tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.paths import MODELS, SHIPPED


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)
