"""The list with digests names what ``make setup`` installs."""

from __future__ import annotations

import re

from tests.paths import ROOT

REQUIREMENTS = ROOT / "requirements"


def pinned(name: str) -> list[str]:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def normal(line: str) -> str:
    name, version = line.split("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def test_every_package_has_one_version_and_a_digest() -> None:
    for line in pinned("cpu.lock"):
        assert re.fullmatch(r"[a-z0-9-]+==[^\s*]+( --hash=sha256:[0-9a-f]{64})+", line), line


def test_both_lists_name_the_same() -> None:
    assert [line.split()[0] for line in pinned("cpu.lock")] == sorted(map(normal, pinned("cpu.txt")))
