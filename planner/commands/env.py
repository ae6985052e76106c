"""``moeq env``: what a report of a fault needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.commands import show
from planner.commands.flags.common import Json
from planner.common.machine import describe_machine
from planner.common.shown import say
from planner.common.units import size


def env_command(as_json: Json = False) -> None:
    """Print versions, processor, memory, GPUs and the kernel that runs on them, for a report of a fault.

    Example: moeq env --json
    """
    found = describe_machine()
    if as_json:
        show.emit(found)
        return
    for name, value in _lines(found):
        say(f"{name}: {value}")


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) for people."""
    for name, version in found["versions"].items():
        yield name, version or "not installed"
    system, cpu, memory, kernel = (found[name] for name in ("system", "cpu", "memory", "kernel"))
    yield "system", ", ".join(system[name] or f"{name} unknown" for name in ("name", "kernel", "libc"))
    yield "compiler", system["compiler"] or "no g++"
    yield "processor", f"{cpu['name'] or 'unknown'}, {cpu['allowed']} of {cpu['cores']} cores"
    yield "instructions", " ".join(cpu["instructions"]) or "unknown"
    yield "memory", f"{size(memory['available_bytes'])} available of {size(memory['total_bytes'])}"
    if not found["gpus"]:
        yield "GPU", "none that torch can use"
    for gpu in found["gpus"]:
        driver = f"driver {gpu['driver'] or 'unknown'}"
        yield "GPU", f"{gpu['name']}, {gpu['capability']}, {size(gpu['memory_bytes'])}, {gpu['runtime']}, {driver}"
    instructions = f", {kernel['instruction_set']}" if kernel["instruction_set"] else ""
    yield "kernel", f"{kernel['chosen'] or 'none'}{instructions}: {kernel['reason']}"
    for name, problem in kernel["others"].items():
        yield f"kernel {name}", problem
    for name, value in found["variables"].items():
        yield name, value
