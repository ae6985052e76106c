"""What a hosting service reads: workflow, issue form, hooks and citation, compared with what they name."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.cli import COMMANDS
from tests.paths import ROOT
from vllm_moeq import __version__

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"
CITATION = ROOT / "CITATION.cff"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/development.md",
    "docs/security.md",
    "docs/architecture.md",
)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: Any) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_something_to_read() -> None:
    assert WORKFLOWS
    assert FORMS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_of_the_makefile(path: Path) -> None:
    workflow = read(path)
    commands = [shlex.split(step["run"]) for step in steps(workflow) if "run" in step]
    assert {"check", "test"} <= {target for _, target in commands}
    assert all(command == "make" and target in targets() for command, target in commands)
    assert all(job["needs"] in workflow["jobs"] for job in workflow["jobs"].values() if "needs" in job)
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_only_and_names_versions(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in path.read_text()
    used = [step for step in steps(workflow) if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in used)
    python = [step["with"] for step in used if "setup-python" in step["uses"]]
    assert python
    for it in python:
        assert f"Python {it['python-version']}" in (ROOT / "requirements" / "README.md").read_text()
        assert (ROOT / it["cache-dependency-path"]).is_file()


def test_hooks_are_the_tools_of_make_lint() -> None:
    lint = (
        (ROOT / "Makefile")
        .read_text()
        .partition("\nlint: setup\n")[2]
        .partition("\n\n")[0]
        .replace("$(BIN)", ".venv/bin")
    )
    pinned = (ROOT / "requirements" / "cpu.txt").read_text()
    for repository in read(HOOKS)["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            assert hook["id"]
            assert hook["name"]
            program, *words = shlex.split(hook["entry"])
            tool = program.removeprefix(".venv/bin/")
            assert re.search(rf"^{tool}==", pinned, re.MULTILINE)
            called = [word for word in words if word != "--force-exclude"]
            assert f"{program} {' '.join(called)}" in lint


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_asks_for_the_environment(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert len(fields) == len(form["body"]) - 1
    assert all(field["attributes"]["label"] for field in fields.values())
    command, name = fields["env"]["attributes"]["label"].split()
    assert command == "moeq"
    assert name in COMMANDS
    assert fields["env"]["validations"]["required"]


def test_the_citation_is_whole() -> None:
    citation = read(CITATION)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        __version__,
        project["license"],
    )
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper"
    assert paper["year"] == 2026
    assert paper["title"] in " ".join((ROOT / "README.md").read_text().split())
    assert all({"family-names", "given-names"} <= author.keys() for author in paper["authors"])


@pytest.mark.parametrize("name", PAGES)
def test_pages_name_what_is_there(name: str) -> None:
    """Links lead to files; what `make` is told to do, it can."""
    page = ROOT / name
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:planner|vllm_moeq|tests|requirements|docs|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)[^`]*`", text):
        assert target in targets()
