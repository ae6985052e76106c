"""What serving a model takes, where vLLM can serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.estimates import Service, ServingNeeds, serving_needs
from planner.model.layout import Layout
from planner.model.recognize import why_unserved
from planner.model.sizes import GRIDS, Sizes, Storage


def possible_serving(
    config: Mapping[str, Any], layout: Layout, sizes: Sizes, service: Service, storage: Storage = GRIDS
) -> ServingNeeds | None:
    """Return what serving a checkpoint takes, or None if vLLM cannot serve it.

    The arguments are those of :func:`planner.estimates.serving.serving_needs`.
    """
    if why_unserved(config) is not None:
        return None
    return serving_needs(config, layout, sizes, service, storage)
