"""A rehearsal of the suite for a GPU: only what its steps run is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.paths import ROOT

USER, HOST = "mallorydoe", "mallorys-workstation"
PASSING = "print('it works')"

STAND_IN = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
plays, words = json.loads(Path(__file__).with_suffix(".json").read_text()), sys.argv[1:]
name = words[1] if words[:1] == ["-m"] else ""
if name == "benchmarks.gpu.suite" or words[:1] == ["-c"]:
    os.execv(REAL, [REAL, *words])
exec(plays[name], {"words": words, "Path": Path, "results": Path(os.environ["RESULTS"])})
"""
"""An interpreter whose modules of the suite's steps are pieces of Python, and everything else the real one."""

FOUND = """
import json
(results / "environment.json").write_text(json.dumps({"packages": ["pytest"], "serving": ""}))
print("NVIDIA Stand-in, GPU-1b2c3d4e-aaaa-bbbb-cccc-0123456789ab")
"""

TALKATIVE = """
import os
(results / "layer").mkdir(exist_ok=True)
(results / "layer/moe_layer.json").write_text('{"source": "%s/models/x"}' % os.environ["HOME"])
print(os.environ["HOME"], os.environ["USER"], os.environ["HOSTNAME"], "10.1.2.3", "mallorydoe@example.org")
print('File "/opt/secret/lib/python3.12/site-packages/torch/x.py", line 3')
"""

SERVED = """
made = results / "serving/serving/quantized"
made.mkdir(parents=True)
for name in ("config.json", "model.safetensors", "README.md"):
    (made / name).write_text("a model's")
(results / "serving/serving/prompts.json").write_text("a user's text")
(results / "serving/serving/moeq.log").write_text("started")
(results / "serving/serving.md").write_text("| fast |")
"""

PLAYS = {
    "benchmarks.gpu.environment": FOUND,
    "pytest": PASSING,
    "benchmarks.kernels.moe_layer": TALKATIVE,
    "benchmarks.serving.throughput": SERVED,
    "benchmarks.kernels.figure3": PASSING,
}


class Rehearsal:
    """One run of the script with stand-ins."""

    def __init__(self, folder: Path, **changed: str) -> None:
        self.results, self.home = folder / "out put", folder / USER
        self.home.mkdir()
        python = folder / "python"
        python.write_text(STAND_IN.replace("REAL", repr(sys.executable)))
        python.chmod(0o755)
        python.with_suffix(".json").write_text(json.dumps({**PLAYS, **changed}))
        self.environment = {
            **os.environ, "PYTHON": str(python), "HOME": str(self.home), "USER": USER, "LOGNAME": USER,
            "HOSTNAME": HOST, "TMPDIR": str(folder), "RESULTS": str(self.results),
        }  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        """Start it in a session of its own, as a terminal does."""
        return subprocess.Popen(
            ["benchmarks/gpu_suite.sh", str(self.results)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=ROOT, env=self.environment, start_new_session=True,
        )  # fmt: skip

    def run(self) -> tuple[int, str]:
        """Run it; return its exit status and what it printed."""
        process = self.start()
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def summary(self) -> dict[str, str]:
        """Return step → result."""
        lines = (self.results / "suite.md").read_text().splitlines()[2:]
        return {cells[1]: cells[2] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}

    def archive(self) -> dict[str, str]:
        """Return name → text of everything in the archive, after a look at its owners."""
        with tarfile.open(f"{self.results}.tar.gz") as archive:
            members = archive.getmembers()
            assert {(it.uid, it.gid, it.uname, it.gname, it.mtime) for it in members} == {(0, 0, "", "", 0)}
            return {it.name: archive.extractfile(it).read().decode() for it in members}  # type: ignore[union-attr]
