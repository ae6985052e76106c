"""Convert tensor names. GPTQModel uses the names of transformers' modules; our checkpoints use the source's names."""

from __future__ import annotations

import re

from planner.model.architectures import Architecture

LAYER = re.compile(r"^model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)$")
EXPERT = re.compile(r"^mlp\.experts\.([0-9]+)\.([^.]+)(.*)$")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def module_name(row: Architecture, name: str) -> str:
    """Return GPTQModel's name for a tensor or module of our checkpoint."""
    match = LAYER.match(name)
    if match is None:
        return name
    inside = row.module_name(match.group(2))
    expert = EXPERT.match(inside)
    if expert is not None:
        projection = dict(zip(row.projections.names(), PROJECTIONS, strict=True)).get(expert.group(2), expert.group(2))
        inside = f"mlp.experts.{expert.group(1)}.{projection}{expert.group(3)}"
    return f"model.layers.{match.group(1)}.{inside}"


def checkpoint_name(row: Architecture, name: str) -> str:
    """Return our name for a tensor or module of a GPTQ checkpoint. The checkpoint may use either kind of name."""
    match = LAYER.match(name)
    if match is None:
        return name
    index, inside = int(match.group(1)), match.group(2)
    expert = EXPERT.match(inside)
    if expert is not None:
        projection = dict(zip(PROJECTIONS, row.projections.names(), strict=True)).get(expert.group(2), expert.group(2))
        inside = f"mlp.experts.{expert.group(1)}.{projection}{expert.group(3)}"
    return row.checkpoint_name(index, inside)
