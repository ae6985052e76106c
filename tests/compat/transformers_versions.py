"""Run the tests of what loads models in transformers with other versions than the pinned one.

    python -m tests.compat.transformers_versions [5.24 …]

Each version is installed into build/transformers, once, without what it asks for: the pinned set has that. Without
arguments all versions of transformers.json are tested. The table is made by tests/compat/hooks.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.compat.hooks import TABLE
from tests.paths import ROOT

FOLDER = ROOT / "build" / "transformers"
TESTS = (
    "tests/hf",
    "tests/planner/model/test_whole.py",
    "tests/planner/model/test_config_sizes.py",
    "tests/planner/model/test_architectures.py",
    "tests/planner/calibration/test_activation.py",
    "tests/planner/calibration/test_calibration.py",
    "tests/planner/calibration/test_divergence.py",
    "tests/planner/calibration/test_gradients.py",
    "tests/planner/evaluation/test_eval.py",
)
"""What imports transformers and starts no server."""


def install(version: str) -> Path:
    """Return the folder of a version, installed where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    folder = FOLDER / version
    if not (folder / "transformers" / "__init__.py").exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder,
             f"transformers=={version}.*"],
            check=True,
        )  # fmt: skip
    return folder


def run(version: str) -> int:
    """Return the exit status of the tests with a version."""
    path = os.pathsep.join((str(install(version)), str(ROOT)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not (server or full)", *TESTS]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}).returncode


def main() -> None:
    """Test the versions of the command line."""
    for version in sys.argv[1:] or json.loads(TABLE.read_text()):
        print(f"transformers {version}", flush=True)
        if run(version):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
