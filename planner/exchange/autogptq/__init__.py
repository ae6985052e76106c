"""Checkpoints in AutoGPTQ's format, to and fro without requantizing (docs/format.md)."""

from planner.exchange.autogptq.export import export_gptq
from planner.exchange.autogptq.importer import import_gptq

__all__ = ["export_gptq", "import_gptq"]
