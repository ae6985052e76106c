"""What a GPU's figures depend on: the card, its driver, the packages; and which of them are missing.

python -m benchmarks.gpu.environment FOLDER
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import environment
from planner.common.machine import gpus

FILE = "environment.json"
CLOCKS = ("power.limit", "clocks.max.sm", "clocks.max.memory")
PLUGIN = "vllm_moeq:register"
OPTIONAL = ("pytest", "xdist", "matplotlib", "openai")
"""Packages without which a part is left out."""


def clocks() -> dict[str, str]:
    """Return the card's limits as nvidia-smi names them; nothing where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    first = next(iter(answer.splitlines()), "")
    return dict(zip(CLOCKS, (value.strip() for value in first.split(",")), strict=False))


def problem_of_vllm() -> str:
    """Return why no server can be started, or an empty string."""
    try:
        importlib.import_module("vllm")
    except Exception as error:  # whatever an installation for another CUDA raises
        return f"vLLM cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    plugins = [entry.value for entry in entry_points(group="vllm.general_plugins")]
    return "" if PLUGIN in plugins else "vLLM does not find the plugin: expected pip install of this repository"


def describe() -> dict[str, Any]:
    """Return everything as JSON values."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {**environment(device), "gpus": gpus(), "clocks": clocks(), "serving": problem_of_vllm()}
    return {**found, "packages": [name for name in OPTIONAL if find_spec(name) is not None]}


def main() -> int:
    """Write environment.json and print it; 1 where torch sees no GPU, or Triton is missing."""
    found = describe()
    (Path(sys.argv[1]) / FILE).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if not found["gpus"]:
        print("error: expected a GPU that torch can use, found none", file=sys.stderr)
        return 1
    if "triton" not in found["versions"]:
        print("error: expected Triton, found none: pip install triton", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
