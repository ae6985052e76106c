"""How a benchmark's command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vllm_moeq.format import MoeqError


def exit_status(work: Callable[[], None]) -> int:
    """Do the work and return 0; for a user's mistake print its one line and return 2."""
    try:
        work()
    except MoeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
