"""What can be known to be wrong before vLLM's server takes its minutes to start: port, memory, tokenizer, name."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from errno import EADDRINUSE
from pathlib import Path
from typing import Any

import torch

from planner.common.memory import available_bytes, node_available_bytes
from planner.common.units import GIB, size
from planner.model.hub import has_tokenizer, resolve_model
from planner.text.tokenizer import load_tokenizer
from vllm_moeq.format import UsageError

PORT = 8000
"""vLLM's default."""

CACHE_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"

PROCESSOR_TEMPLATE = "chat_template.json"
"""A processor's template, which vLLM prefers to the tokenizer's."""

BESIDE = 3 * GIB
"""What vLLM's processes take beside weights and cache."""


def value_of(arguments: Sequence[str], *flags: str) -> str | None:
    """Return the last value of a flag among vLLM's arguments, or None if it is not there.

    Args:
        arguments: vLLM's arguments; it takes ``--a-b value``, ``--a-b=value`` and ``--a_b value``.
        flags: the flag's names.
    """
    found = None
    for number, argument in enumerate(arguments):
        flag, assigned, value = argument.partition("=")
        if flag_name(flag) in flags:
            following = arguments[number + 1] if number + 1 < len(arguments) else ""
            found = value if assigned else following
    return found


def flag_name(argument: str) -> str:
    """Return a flag as vLLM reads it, with hyphens for underscores."""
    return argument.replace("_", "-") if argument.startswith("--") else argument


def find_checkpoint(model: str, arguments: Sequence[str]) -> Path:
    """Return a checkpoint's folder; one on the Hub is downloaded, by vLLM's ``--revision`` into its ``--download-dir``.

    Raises:
        MoeqError: neither a folder nor a name on the Hub or in its local cache.
    """
    return resolve_model(model, revision=value_of(arguments, "--revision"), cache=value_of(arguments, "--download-dir"))


def check_tokenizer(folder: Path, arguments: Sequence[str]) -> Any:
    """Require a tokenizer in the folder, unless a flag names another one or none; return it, or None.

    Raises:
        MoeqError: there is none, it cannot be loaded, or it has tokens without an embedding.
    """
    if value_of(arguments, "--tokenizer", "--skip-tokenizer-init") is not None:
        return None
    if not has_tokenizer(folder):
        raise UsageError(
            f"{folder}: expected a tokenizer, such as tokenizer.json, found none; copy the source's, "
            "or name a folder with --tokenizer"
        )
    return load_tokenizer(folder)


def chat_note(folder: Path, tokenizer: Any, arguments: Sequence[str]) -> str | None:
    """Return a note for a model that nobody can chat with; None where vLLM has a template, or finds one elsewhere.

    Args:
        folder: the checkpoint.
        tokenizer: its tokenizer; None where vLLM gets another one.
        arguments: the user's flags for vLLM.
    """
    elsewhere = value_of(arguments, "--chat-template", "--tokenizer-mode") is not None
    if tokenizer is None or elsewhere or (folder / PROCESSOR_TEMPLATE).exists():
        return None
    try:
        tokenizer.get_chat_template()
    except ValueError:  # there is none, or several and none of them is the default
        return (
            f"note: {folder} has no chat template: /v1/completions answers, /v1/chat/completions will refuse; "
            "--chat-template FILE gives one"
        )
    return None


def check_port(arguments: Sequence[str]) -> None:
    """Require that the port is free.

    Raises:
        UsageError: another process listens there; the message names a free port.
    """
    host, port = value_of(arguments, "--host") or "", value_of(arguments, "--port") or str(PORT)
    if value_of(arguments, "--uds") is not None or not port.isdecimal() or int(port) > 65535:
        return  # no port, or one that vLLM refuses at once
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does: closed connections do not count
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            if error.errno != EADDRINUSE:
                return
            probe.bind((host, 0))
            other = probe.getsockname()[1]
            raise UsageError(
                f"--port: expected a free port, found {port} in use by another server; {other} is free"
            ) from None


def cache_flags(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return vLLM's flag for the memory of its cache on a CPU; none on a GPU, or where the user says how much.

    By default vLLM wants 92% of the memory and stops after two minutes where less is free. A rank's cache must also fit
    beside its weights in the NUMA node that vLLM binds it to.

    Args:
        folder: the checkpoint.
        arguments: the user's flags for vLLM.

    Raises:
        UsageError: the flags or the weights ask for more memory than is free.
    """
    if torch.cuda.is_available() or torch.xpu.is_available():
        return []
    free = available_bytes(torch.device("cpu"))
    own = {flag: value for flag in CACHE_FLAGS if (value := value_of(arguments, flag)) is not None}
    if own or os.environ.get(CACHE_VARIABLE):
        _check_own(own, free)
        return []
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    left = free - weights - BESIDE
    if left <= 0:
        raise UsageError(
            f"{folder}: expected {size(weights + BESIDE)} of free memory for weights and vLLM, found {size(free)}; "
            f"free some, or say with {CACHE_FLAGS[0]} what the cache may take"
        )
    ranks = 1
    for names in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
        count = value_of(arguments, *names) or "1"
        ranks *= int(count) if count.isdecimal() and int(count) > 0 else 1
    node = node_available_bytes()
    on_node = left if node is None else node - weights // ranks - BESIDE
    # A node that the weights alone fill gives no bound: vLLM can be told not to bind.
    return [CACHE_FLAGS[0], str(min(left // ranks, on_node if on_node > 0 else left) // 2)]


def _bytes(text: str) -> int:
    """Return a number of bytes as vLLM reads it, small letters for powers of 1000, capitals of 1024; else 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text)
    if found is None:
        return 0
    base = 1024 if found[2].isupper() else 1000
    return int(float(found[1]) * base ** (" kmgt".index(found[2].lower() or " ")))


def _check_own(own: dict[str, str], free: int) -> None:
    """Refuse what the user wants for the cache if it is more than is free; numbers with units are left to vLLM."""
    asked = own.get(CACHE_FLAGS[0], "")
    name, wanted = CACHE_FLAGS[0], _bytes(asked)
    variable = os.environ.get(CACHE_VARIABLE, "")
    if variable.isdecimal():  # on CPUs vLLM prefers it to the flags
        name, wanted = CACHE_VARIABLE, int(variable) * GIB
    if wanted > free:
        raise UsageError(f"{name}: expected less than the {size(free)} of free memory, found {size(wanted)}")
    if wanted or asked:
        return
    share = own.get(CACHE_FLAGS[1], "")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        too_much = float(share) * total > free
    except ValueError:
        return
    if too_much:
        raise UsageError(
            f"{CACHE_FLAGS[1]}: expected at most {int(free / total * 100) / 100}, the free share of the memory "
            f"({size(free)}), found {share}"
        )
