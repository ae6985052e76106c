"""``moeq verify``: check that a checkpoint is whole."""

from __future__ import annotations

from planner.commands import show
from planner.commands.flags.common import Folder, Json
from planner.model.whole import check_checkpoint


def verify_command(folder: Folder, as_json: Json = False) -> None:
    """Check every tensor of a checkpoint: presence, shapes, widths, finite scales.

    Example: moeq verify Mixtral-8x7B-2.5bit
    """
    summary = check_checkpoint(folder)
    if as_json:
        show.emit({**vars(summary), "total_bytes": summary.total_bytes})
    else:
        show.print_summary(summary)
