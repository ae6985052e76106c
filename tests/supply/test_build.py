"""The wheel is the same bytes every time; wheel and sdist install where nothing of this folder is, and work there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.tiers import thorough
from vllm_moeq.kernels.cpu.build import problem

pytestmark = pytest.mark.slow

PARTS = ("planner", "vllm_moeq", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys, setuptools.build_meta as it; print('built', getattr(it, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind: str, folder: Path, native: bool = False) -> Path:
    """Build a wheel or an sdist of a fresh copy, whose files are as old as the copy; without the compiled kernel."""
    source, target = folder / "source", folder / "built"
    target.mkdir(parents=True)
    for part in (*PARTS, "setup.py", "MANIFEST.in"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / part).exists():
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / part, source / part)
    for path in source.rglob("*"):
        os.utime(path)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "VLLM_MOEQ_BUILD_NATIVE": str(int(native))}
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    result = subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True, text=True)
    return target / result.stdout.splitlines()[-1].removeprefix("built ")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.mark.full
def test_the_wheel_is_the_same_bytes_again(wheel: Path, tmp_path: Path) -> None:
    assert build("wheel", tmp_path).read_bytes() == wheel.read_bytes()


def packaged(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(("planner/", "vllm_moeq/")) and not name.endswith("/")}


def sources() -> set[str]:
    """Return the files of both packages, without what Python or a compiler has made of them."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in ("planner", "vllm_moeq")
        for path in (ROOT / package).rglob("*.*")
        if path.suffix not in (".pyc", ".so")
    }


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert packaged(archive.namelist()) >= sources()


@pytest.mark.full
def test_the_sdist_holds_every_module(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert packaged([name.partition("/")[2] for name in archive.getnames()]) >= sources()


@pytest.mark.parametrize("kind", thorough(["wheel", "sdist"], ["wheel"]))
def test_installed_elsewhere_it_works(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, quantized_mixtral: Path
) -> None:
    """The environment has the dependencies of this one, and not this project's folder."""
    archive: Path = request.getfixturevalue(kind)
    place = tmp_path / "environment"
    venv.create(place)
    python = place / "bin" / "python"
    run = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(run, text=True).strip())
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", "--no-warn-script-location"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *options, str(archive)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["VLLM_MOEQ_BUILD_NATIVE"] = "0"
    subprocess.run(command, check=True, env=environment)
    code = (
        "import importlib.metadata as m, planner, vllm_moeq, pathlib\n"
        "print(pathlib.Path(planner.__file__).parents[1], pathlib.Path(vllm_moeq.__file__).parents[1])\n"
        "print([e.value for e in m.entry_points(group='vllm.general_plugins') if e.name == 'moeq'])\n"
        "print(m.version('vllm-moeq'))\n"
    )
    found = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path, env=environment).splitlines()
    assert found[0] == f"{site} {site}"
    assert "vllm_moeq:register" in found[1]
    moeq = place / "bin" / "moeq"
    assert subprocess.check_output([moeq, "--version"], text=True, env=environment).strip() == found[2]
    verified = subprocess.run([moeq, "verify", quantized_mixtral, "--json"], env=environment, capture_output=True)
    assert verified.returncode == 0
    assert b'"experts": 16' in verified.stdout


@pytest.mark.full
def test_a_wheel_brings_the_cpu_kernel(tmp_path: Path) -> None:
    """Where it is installed nothing is compiled, and nothing could be; another folder makes the same bytes."""
    if problem():
        pytest.skip(problem())
    made = build("wheel", tmp_path / "made", native=True)
    assert build("wheel", tmp_path / "made-again", native=True).read_bytes() == made.read_bytes()
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "installed")
    code = "from vllm_moeq.kernels.cpu import build; print(build.__file__, build.problem())"
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "installed"),
        "CXX": "false",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }
    found = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path, env=environment)
    assert found == f"{tmp_path / 'installed/vllm_moeq/kernels/cpu/build.py'} \n"
