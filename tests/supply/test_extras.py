"""Each extra can be installed beside every vLLM that it is said to work with."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.supply.requires import VERSIONS, common, names, pip_report, project, requires_of, table, wanted
from tests.supply.test_build import build

WITH_VLLM = ("gpu", "all")
BESIDE = ("hf", "calibrate", "eval", "report", "ray", "bench", *WITH_VLLM)
"""The extras for users. ``cpu`` names the other distribution of vLLM, ``dev`` is for the pinned environment."""


def allowed() -> SpecifierSet:
    """Return the versions of vLLM that ``gpu`` takes."""
    return next(it.specifier for it in wanted("gpu") if it.name == "vllm")


def conflicts(extra: str, version: str) -> list[str]:
    """Return what an extra and a version of vLLM cannot agree on."""
    theirs = table()[version]
    ours = {str(canonicalize_name(it.name)): it.specifier for it in wanted(extra)}
    return [
        f"{name}{mine} and {name}{theirs[name]}"
        for name, mine in ours.items()
        if name in theirs and not common(mine, SpecifierSet(theirs[name]))
    ]


@pytest.mark.parametrize("version", [it for it in VERSIONS if allowed().contains(f"{it}.0")])
@pytest.mark.parametrize("extra", BESIDE)
def test_an_extra_agrees_with_vllm(extra: str, version: str) -> None:
    assert conflicts(extra, version) == []


def test_a_version_of_vllm_is_left_out_only_where_nothing_fits() -> None:
    left_out = [version for version in VERSIONS if not allowed().contains(f"{version}.0")]
    assert {version: conflicts("hf", version) for version in left_out} == {
        "0.31": ["transformers<5.25,>=5.19 and transformers<5.18.0,>=5.10.4"]
    }


def test_every_extra_is_tested_here_or_for_this_environment() -> None:
    assert sorted(project()["optional-dependencies"]) == sorted([*BESIDE, "cpu", "dev"])


def test_a_gpu_gets_what_the_commands_of_the_readme_need() -> None:
    assert {"vllm", "datasets", "accelerate", "transformers", "lm-eval", "matplotlib"} <= names("gpu")
    assert names("all") == names(*BESIDE)


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        (">=5.19,<5.25", ">=5.16.1,<5.21", True),
        (">=5.19,<5.25", ">=5.10.4,<5.18", False),
        (">=2.6", "==2.13.0", True),
        ("", "<3", True),
        (">=2", "<2", False),
        (">=1", ">=1,!=1.*", True),
    ],
)
def test_a_common_version_is_found(first: str, second: str, fits: bool) -> None:
    assert common(SpecifierSet(first), SpecifierSet(second)) is fits


@pytest.mark.full
@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_is_what_the_index_says(version: str) -> None:
    assert requires_of(version) == table()[version]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("extras"))


def resolved(*arguments: str) -> dict[str, str]:
    """Return the versions that pip would install."""
    return {str(canonicalize_name(it["name"])): it["version"] for it in pip_report(*arguments)}


@pytest.mark.full
@pytest.mark.parametrize("extra", [*BESIDE, "cpu"])
def test_pip_resolves(wheel: Path, extra: str) -> None:
    """pip reads the metadata of some two hundred packages and downloads none of the large ones."""
    found = resolved(f"{wheel}[{extra}]")
    for requirement in wanted(extra):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


@pytest.mark.full
@pytest.mark.parametrize("version", [it for it in VERSIONS if allowed().contains(f"{it}.0")])
def test_pip_resolves_everything_beside_each_vllm(wheel: Path, version: str) -> None:
    found = resolved(f"{wheel}[all]", f"vllm=={version}.*")
    assert found["vllm"].startswith(version)
    assert Requirement(f"transformers{table()[version]['transformers']}").specifier.contains(found["transformers"])
