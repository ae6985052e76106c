"""Convert checkpoints to and from AutoGPTQ's format without quantizing again (docs/format.md)."""

from planner.exchange.autogptq.export import export_gptq
from planner.exchange.autogptq.importer import import_gptq

__all__ = ["export_gptq", "import_gptq"]
