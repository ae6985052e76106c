"""Runners of layer tasks, one kind per file. All write the same bytes."""

from planner.quantization.runners.base import CONTINUES, Runner, Work
from planner.quantization.runners.choose import choose_runner
from planner.quantization.runners.inline import InlineRunner
from planner.quantization.runners.processes import ProcessRunner

__all__ = ["CONTINUES", "InlineRunner", "ProcessRunner", "Runner", "Work", "choose_runner"]
