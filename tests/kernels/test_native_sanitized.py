"""The kernel under the address and undefined-behaviour sanitizers, without torch around it.

In every run, test_native.py has the same kernels compute such layers, without the sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_moeq.kernels.cpu import build

pytestmark = [pytest.mark.compiler, pytest.mark.full]

# Without optimization: instrumented and optimized, the inlined kernels would take minutes to compile.
PARTS = (
    "host.cpp", "repack.cpp", "isa_scalar.cpp", "isa_avx2.cpp", "encode_scalar.cpp", "encode_avx2.cpp",
    "encode_avx512.cpp",
)  # fmt: skip
DRIVER = ("native_driver.cpp", "emulated_avx512.cpp", "emulated_vnni.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++17", "-mavx2", "-mf16c", "-O0", "-g1", "-fopenmp", *SANITIZERS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_random_layers_are_clean(tmp_path: Path) -> None:
    """Layers of any shape, in buffers of exactly their size."""
    parts = [*(build.SOURCES / name for name in PARTS), *(Path(__file__).with_name(name) for name in DRIVER)]
    objects = [tmp_path / f"{path.stem}.o" for path in parts]
    compilers = [
        subprocess.Popen(["g++", *FLAGS, f"-I{build.SOURCES}", "-c", str(source), "-o", str(target)])
        for source, target in zip(parts, objects, strict=True)
    ]
    assert [each.wait() for each in compilers] == [0] * len(parts)
    program = tmp_path / "driver"
    subprocess.run(["g++", *FLAGS, *map(str, objects), "-o", str(program)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    found = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    assert found.stdout.split("\n")[:-1] == [
        f"{isa}: 60 layers and linears" for isa in ("scalar", "avx2", "avx512", "vnni")
    ]
