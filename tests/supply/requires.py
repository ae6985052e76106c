"""What our extras ask for, and what the CUDA distribution of vLLM asks for beside them.

To renew the table of vLLM's requirements, which asks PyPI for metadata alone:

    python -m tests.supply.requires
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import ROOT

TABLE = Path(__file__).with_name("vllm_requires.json")
"""Version of vLLM → package → specifier, on x86-64 Linux with Python 3.11."""

VERSIONS = ("0.30", "0.31", "0.32", "0.33")
OURS = "vllm-moeq"
MACHINE = {"python_version": "3.11", "platform_machine": "x86_64", "platform_system": "Linux", "extra": ""}


@cache
def project() -> dict[str, Any]:
    """Return the section ``project`` of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def wanted(*extras: str) -> list[Requirement]:
    """Return what an installation with some extras asks for, the extras within them included."""
    texts = [*project()["dependencies"], *(text for extra in extras for text in _texts(extra))]
    return [Requirement(text) for text in dict.fromkeys(texts)]


def _texts(extra: str) -> list[str]:
    found: list[str] = []
    for text in project()["optional-dependencies"][extra]:
        requirement = Requirement(text)
        inner = sorted(requirement.extras) if requirement.name == OURS else []
        found += [it for name in inner for it in _texts(name)] if inner else [text]
    return found


def names(*extras: str) -> set[str]:
    """Return the names of the packages that an installation with some extras asks for."""
    return {canonicalize_name(requirement.name) for requirement in wanted(*extras)}


def common(first: SpecifierSet, second: SpecifierSet) -> bool:
    """Tell whether some version fits both specifiers: the highest of their lower bounds, if any does."""
    bounds = [it.version.removesuffix(".*") for both in (first, second) for it in both if it.operator in (">=", "==")]
    candidates = [*map(Version, bounds), Version("0"), Version("9999")]
    return any(first.contains(it) and second.contains(it) for it in candidates)


def pip_report(*arguments: str) -> list[dict[str, Any]]:
    """Return the metadata of everything that pip would install into an empty environment.

    Raises:
        subprocess.CalledProcessError: the requirements conflict; pip's words are on stderr.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    result = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    return [item["metadata"] for item in json.loads(result.stdout)["install"]]


def requires_of(version: str) -> dict[str, str]:
    """Return what PyPI says that a version of vLLM asks for."""
    (metadata,) = pip_report("--no-deps", "--only-binary", ":all:", f"vllm=={version}.*")
    found = [Requirement(text) for text in metadata["requires_dist"]]
    here = [it for it in found if it.marker is None or it.marker.evaluate(MACHINE)]
    return {str(canonicalize_name(it.name)): str(it.specifier) for it in sorted(here, key=lambda it: it.name.lower())}


def table() -> dict[str, dict[str, str]]:
    """Return the recorded table."""
    found: dict[str, dict[str, str]] = json.loads(TABLE.read_text())
    return found


if __name__ == "__main__":
    TABLE.write_text(json.dumps({version: requires_of(version) for version in VERSIONS}, indent=1) + "\n")
