"""Every command of README.md and docs/ is one that exists, with flags that it takes; links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.common.install import CPU_INSTALL, install_command
from planner.planning.methods import METHODS
from tests.docs.cli_reference import commands as moeq_commands
from tests.docs.documents import PAGES, Command, anchors, commands, links, mentions
from tests.paths import ROOT
from vllm_moeq.kernels.backends import BACKENDS

MOEQ = moeq_commands()
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = [command for page in PAGES for command in commands(page)]
VARIABLES = ("LD_PRELOAD",)
"""Variables that are neither vLLM's nor ours."""

CLONED = "vllm-moeq"
"""The folder that a clone makes."""

REQUIREMENTS = re.compile(r"pip install (?:--no-deps |--require-hashes )+-r (\S+)$")


def vllm_folder() -> Path:
    """Return vLLM's folder, without importing it; skip the test where it is missing."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(found.origin).parent


def is_flag_of_vllm(flag: str) -> bool:
    """Tell whether vLLM has a flag: its flags are the fields of its configs and of its servers' arguments."""
    root, name = vllm_folder(), flag.removeprefix("--").replace("-", "_")
    paths = [
        *(root / "config").glob("*.py"),
        *(root / "entrypoints").rglob("cli_args.py"),
        root / "engine/arg_utils.py",
    ]
    return any(re.search(rf"^\s+{name}: ", path.read_text(), re.MULTILINE) for path in paths)


def is_variable(name: str) -> bool:
    """Tell whether something reads a variable: vLLM, or one of our kernels."""
    if name.startswith("VLLM_MOEQ_"):
        return any(f'"{name}"' in path.read_text() for path in (ROOT / "vllm_moeq").rglob("*.py"))
    return name in VARIABLES or f'"{name}"' in (vllm_folder() / "envs.py").read_text()


def check_moeq(command: Command) -> None:
    """Parse it: names of commands and flags, choices, numbers, and flags that would be ignored."""
    _, name, *rest = command.words
    known = MOEQ[name]
    context = None if command.cut else known.make_context(name, list(rest))
    if context is None:
        check_flags(name, rest)
    elif name == "serve":
        assert all(is_flag_of_vllm(word) for word in context.args if word.startswith("--")), context.args


def check_flags(name: str, words: list[str]) -> None:
    """Require that a command has the flags among some words; those of serve, and what follows `--`, are vLLM's."""
    known = {option for parameter in MOEQ[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    vllm = name == "serve"
    for word in words:
        flag = word.partition("=")[0]
        vllm = vllm or word == "--"
        if flag.startswith("-") and flag.strip("-") and flag not in ("--help", "-h"):
            assert flag in known or (vllm and is_flag_of_vllm(flag)), f"moeq {name} {flag}"


def check_python(command: Command) -> None:
    """Find the script, and its flags in its source."""
    _, first, *rest = command.words
    path = ROOT / (f"{rest[0].replace('.', '/')}.py" if first == "-m" else first)
    assert path.is_file(), path
    assert [flag for flag in rest[1:] if flag.startswith("--") and f'"{flag}"' not in path.read_text()] == []


def check_make(command: Command) -> None:
    """Find the target, and the variable that is set for it."""
    for word in command.words[1:]:
        name, assigned, _ = word.partition("=")
        assert re.search(rf"^{name}\s*\?=" if assigned else rf"^{name}:", MAKEFILE, re.MULTILINE), word


def check_pip(command: Command) -> None:
    """Allow a requirements file of this repository, or what :func:`install_command` gives for an extra or none."""
    text = command.text.partition("#")[0].strip()
    if requirements := REQUIREMENTS.match(text):
        assert (ROOT / requirements[1]).is_file()
        return
    extra = re.search(r"\[(\w+)\]", text)
    here = install_command(extra[1] if extra else None)
    assert text.replace(" --no-deps", "") in (here, here.replace("'.", f"'./{CLONED}")), text


def check_program(command: Command) -> None:
    """Find a script that is run by itself."""
    assert (ROOT / command.words[0]).is_file()


def nothing_to_check(_: Command) -> None:
    """Accept what belongs to the shell."""


CHECKS: dict[str, Callable[[Command], None]] = {
    "moeq": check_moeq,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "benchmarks/gpu_suite.sh": check_program,
    ".": nothing_to_check,
    "kill": nothing_to_check,
}
"""Program → what is asked of its command; another program needs a row."""


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_exists(command: Command) -> None:
    CHECKS[command.words[0]](command)
    assert [variable for variable in command.variables if not is_variable(variable)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_their_flags(page: str) -> None:
    for _, name, *rest in mentions(page):
        if name in MOEQ:
            check_flags(name, [word for word in rest if word != "…"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_guide_names_methods_and_backends() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert [name for name in (*METHODS, *BACKENDS) if f"`{name}`" not in guide] == []


def test_the_first_screen() -> None:
    """What it is, how to install, try and test it, and what it costs, within 45 lines."""
    first = (ROOT / "README.md").read_text().splitlines()[:45]
    text = "\n".join(first)
    for needed in (
        "--data",
        "moeq serve",
        "pip install",
        CPU_INSTALL,
        "make demo",
        "make test",
        "not on PyPI",
        "9.52",
    ):
        assert needed in text, needed
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_every_kind_of_command_is_found() -> None:
    """If a page's form changes, its commands must not be lost."""
    assert {command.words[0] for command in COMMANDS} == set(CHECKS)
    found: dict[str, Any] = {page: len(commands(page)) for page in PAGES}
    assert found["README.md"] > 20
    assert found["docs/guide.md"] > 12
