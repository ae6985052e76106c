"""What runs the layer tasks, one kind per file; all write the same bytes."""

from planner.runners.base import KEPT, Runner, Work
from planner.runners.choose import choose_runner
from planner.runners.inline import InlineRunner
from planner.runners.processes import ProcessRunner

__all__ = ["KEPT", "InlineRunner", "ProcessRunner", "Runner", "Work", "choose_runner"]
