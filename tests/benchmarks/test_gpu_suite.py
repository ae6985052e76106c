"""The suite for a GPU, rehearsed without one: only what its steps run is a stand-in."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import suite as module
from benchmarks.gpu.archive import Scrubber
from benchmarks.gpu.steps import Ended, interruptible, run_step
from tests.benchmarks.rehearsal import FOUND, HOST, USER, Rehearsal
from tests.paths import ROOT

pytestmark = pytest.mark.slow


def test_everything_passes_and_nothing_of_the_machine_is_sent(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    status, output = rehearsal.run()
    assert status == 0, output
    assert list(rehearsal.summary().items()) == [
        ("environment", "passed"),
        ("tests", "passed"),
        ("layer", "passed"),
        ("layer-again", "skipped: no kernel broke the device"),
        ("serving", "passed"),
        ("figure3", "skipped: no STATISTICS"),
    ]
    assert f"archive: {rehearsal.results}.tar.gz" in output
    sent = rehearsal.archive()
    assert {"gpu-report/suite.md", "gpu-report/environment.json", "gpu-report/layer/moe_layer.json"} <= set(sent)
    assert "gpu-report/serving/serving/moeq.log" in sent
    assert not [name for name in sent if "quantized" in name or "safetensors" in name or "prompts" in name]
    everything = "\n".join([*sent, *sent.values()])
    for secret in (USER, HOST, str(rehearsal.home), str(ROOT), str(tmp_path), "/opt/secret", "10.1.2.3", "1b2c3d4e"):
        assert secret not in everything
    assert 'File "site-packages/torch/x.py", line 3' in everything


def test_a_failing_step_does_not_stop_the_next(tmp_path: Path) -> None:
    changed = {"pytest": "raise SystemExit(1)", "benchmarks.kernels.moe_layer": "import os; os.abort()"}
    rehearsal = Rehearsal(tmp_path, **changed)
    status, output = rehearsal.run()
    assert status == 1, output
    found = rehearsal.summary()
    assert (found["tests"], found["layer"], found["serving"]) == ("failed, status 1", "failed, signal 6", "passed")


def test_nothing_follows_a_missing_card(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, **{"benchmarks.gpu.environment": "print('error: no GPU'); raise SystemExit(1)"})
    status, output = rehearsal.run()
    assert status == 1
    assert rehearsal.summary() == {"environment": "failed, status 1"}
    assert "error: no GPU" in output
    assert "error: no GPU" in rehearsal.archive()["gpu-report/environment.log"]


def test_without_vllm_and_pytest(tmp_path: Path) -> None:
    missing = FOUND.replace('["pytest"], "serving": ""', '[], "serving": "vLLM cannot be imported"')
    rehearsal = Rehearsal(tmp_path, **{"benchmarks.gpu.environment": missing})
    status, _ = rehearsal.run()
    found = rehearsal.summary()
    assert status == 0
    assert found["tests"] == "skipped: pytest is not installed"
    assert found["serving"] == "skipped: vLLM cannot be imported"
    assert found["layer"] == "passed"


def test_a_kernel_that_broke_the_device(tmp_path: Path) -> None:
    broken = """
again = results / "layer-again"
if again.name in " ".join(words):
    again.mkdir()
    (again / "moe_layer.md").write_text(" ".join(words[words.index("--peers"):]))
else:
    (results / "layer").mkdir()
    (results / "layer/retry.txt").write_text("triton bf16")
    raise SystemExit(3)
"""
    rehearsal = Rehearsal(tmp_path, **{"benchmarks.kernels.moe_layer": broken})
    status, _ = rehearsal.run()
    assert status == 1
    assert rehearsal.summary()["layer"] == "failed, status 3"
    assert rehearsal.archive()["gpu-report/layer-again/moe_layer.md"] == "--peers triton bf16"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_keeps_what_was_found(tmp_path: Path, number: signal.Signals, code: int) -> None:
    waiting = """
import subprocess, time
child = subprocess.Popen(["sleep", "300"])
(results / "child.txt").write_text(str(child.pid))
print("half done", flush=True)
time.sleep(300)
"""
    rehearsal = Rehearsal(tmp_path, **{"benchmarks.kernels.moe_layer": waiting})
    process = rehearsal.start()
    place = rehearsal.results / "child.txt"
    until = time.monotonic() + 60
    while not (place.is_file() and place.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert rehearsal.summary() == {"environment": "passed", "tests": "passed", "layer": "interrupted"}
    assert "half done" in rehearsal.archive()["gpu-report/layer.log"]
    assert not alive(int(place.read_text()))


def alive(process: int) -> bool:
    """Tell whether a process runs; one that ended may wait for its parent."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_a_step_that_ran_out_of_time_says_what_it_had(tmp_path: Path) -> None:
    program = """
import signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "300"], start_new_session=False)
print(child.pid, flush=True)
try:
    time.sleep(300)
except KeyboardInterrupt:
    print("what was found", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(0)
"""
    log = tmp_path / "log"
    with interruptible():  # as the suite runs: a shell may have had SIGINT ignored, which the step would inherit
        ended = run_step("x", [sys.executable, "-c", program], log, 2, os.environ)
    assert (ended.result, ended.passed) == ("stopped after 2 s", False)
    child, found = log.read_text().splitlines()
    assert found == "what was found"
    assert not alive(int(child))


def test_no_space_for_a_log_or_the_archive(tmp_path: Path) -> None:
    """``/dev/full`` is a disk without space."""
    rehearsal = Rehearsal(tmp_path)
    rehearsal.results.mkdir()
    (rehearsal.results / "suite.md").symlink_to("/dev/full")
    Path(f"{rehearsal.results}.tar.gz.partial").symlink_to("/dev/full")
    status, output = rehearsal.run()
    assert status == 1, output
    assert "suite.md: No space left on device" in output
    assert output.splitlines()[-1] == f"error: {rehearsal.results}.tar.gz: No space left on device"
    assert not Path(f"{rehearsal.results}.tar.gz").exists()
    assert "| serving | passed |" in output, "the steps went on"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SUITE_SECONDS": "soon"}, "SUITE_SECONDS: expected a number from 60 on, found soon"),
        ({"SUITE_SECONDS": "9"}, "SUITE_SECONDS: expected a number from 60 on, found 9"),
        ({"MODEL": "/no/such"}, "MODEL: expected a file or folder, found none at /no/such"),
    ],
)
def test_mistakes(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    assert module.refusal([str(tmp_path / "x")], variables) == message


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPACE", 1 << 60)
    assert "GiB of free space, found" in module.refusal([str(tmp_path)], {})
    (tmp_path / "file").write_text("")
    assert module.refusal([str(tmp_path / "file")], {}).endswith("File exists")


def test_limits_are_shares_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}

    def ran(name: str, _command: list[str], _log: Path, limit: float, _environment: Any) -> Ended:
        given[name] = limit
        (tmp_path / "environment.json").write_text('{"packages": ["pytest", "xdist"], "serving": ""}')
        return Ended(name, "passed")

    monkeypatch.setattr(module, "run_step", ran)
    module.run(module.Suite(tmp_path, "python", 10 * module.SECONDS, {}), lambda _: None)
    assert given == {step.name: 10 * step.seconds for step in module.STEPS if step.name in given}
    assert list(given) == ["environment", "tests", "layer", "serving"]


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("/home/eve/models/x.json", "HOME/models/x.json"),
        ("-I/home/eve/include -I/opt/cuda", "-IHOME/include -IPATH"),
        ("http://localhost:8000/v1/models", "http://localhost:8000/v1/models"),
        ("tokens/s and 3/4", "tokens/s and 3/4"),
        ("eve-host: eve's, never", "NAME: NAME's, never"),
        ("./benchmarks/x.py", "./benchmarks/x.py"),
        ("/clone/benchmarks/x.py:3", "./benchmarks/x.py:3"),
        ("at 127.0.0.1 and 192.168.1.7:80", "at 127.0.0.1 and ADDRESS:80"),
        ("/clone/.venv/lib/python3.12/site-packages/triton/a.py", "site-packages/triton/a.py"),
        ("torch 2.13.0, CUDA 12.8", "torch 2.13.0, CUDA 12.8"),
    ],
)
def test_scrubbing(text: str, scrubbed: str) -> None:
    scrub = Scrubber({Path("/home/eve"): "HOME", Path("/clone"): "."}, ["eve", "eve-host", "root"])
    assert scrub(text) == scrubbed
