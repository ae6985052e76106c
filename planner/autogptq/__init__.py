"""Checkpoints in AutoGPTQ's format, to and fro without requantizing (docs/format.md)."""

from planner.autogptq.export import export_gptq
from planner.autogptq.importer import import_gptq

__all__ = ["export_gptq", "import_gptq"]
