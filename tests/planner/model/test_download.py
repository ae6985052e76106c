"""Models by their name on the Hub: what is downloaded for what."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.model.hub import COMPANIONS, TEMPLATES, companions
from tests.paths import MIXTRAL, MOEQ
from tests.planner.hub import Hub, open_hub
from tests.planner.model.test_hub import EXTRA, STRANGERS

pytestmark = pytest.mark.slow

NAME = "someone/stdlib-mixtral"
OWN = ("hf_", "hugging")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with open_hub() as found:
        found.shared[NAME] = {path.name: path.read_bytes() for path in MIXTRAL.iterdir() if path.is_file()}
        yield found


def run(hub: Hub, home: Path, *arguments: object) -> dict[str, Any]:
    """Run the command as a user of the stand-in, with an empty cache at first."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().startswith(OWN)}
    clean = {name: value for name, value in clean.items() if not name.lower().endswith("_proxy")}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [MOEQ, *map(str, arguments), "--json"]
    reply = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert reply.returncode == 0, reply.stderr
    found: dict[str, Any] = json.loads(reply.stdout)
    return found


def test_a_dry_run_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    wanted = ("--avg-bits", 2.5, "--dry-run")
    planned = run(hub, tmp_path, "plan", NAME, *wanted)
    made = run(hub, tmp_path, "quantize", NAME, *wanted, "--quantizer", "rtn", "-o", tmp_path / "out")
    assert not [path for path in hub.asked if "safetensors" in path]
    assert any("config.json" in path for path in hub.asked)
    here = run(hub, tmp_path, "quantize", MIXTRAL, *wanted, "--quantizer", "rtn", "-o", tmp_path / "out")
    assert planned["sizes"]["total_bytes"] == made["sizes"]["total_bytes"] == here["sizes"]["total_bytes"]


def test_companions_arrive_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """Weights that the index does not name stay there, as do code and other files."""
    shared = hub.shared[NAME]
    shared |= {name: content.encode() for name, content in ({"README.md": "a card"} | EXTRA).items()}
    shared |= dict.fromkeys((*STRANGERS, "original/model.safetensors", "model-extra.safetensors"), b"no")
    run(hub, tmp_path / "home", "inspect", NAME)
    (folder,) = (tmp_path / "home").glob("**/snapshots/*")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert found == {"config.json", "README.md", "model.safetensors", *companions(folder)}
    assert set(companions(folder)) == {*COMPANIONS, f"{TEMPLATES}/rag.jinja"}


def test_work_downloads_them_once(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(hub, tmp_path, "inspect", NAME)["layers"]
    assert len([path for path in hub.asked if path.endswith("/model.safetensors")]) == 2  # its headers, and itself
