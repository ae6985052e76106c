"""Compiles the CPU kernel into a wheel where that is possible; pyproject.toml has everything else.

``pip wheel --no-build-isolation .`` finds the installed torch and compiles for it. Without torch, without a compiler,
on another processor than x86, in an editable installation or with ``VLLM_MOEQ_BUILD_NATIVE=0`` nothing is compiled: the
kernel is then compiled when it is first needed.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
FOLDER = "vllm_moeq/kernels/cpu"
FLAGS = ["-O2", "-fopenmp", "-Wno-maybe-uninitialized"]  # as in vllm_moeq/kernels/cpu/build.py


def extension() -> dict[str, Any]:
    """Return what setup needs to compile the kernel, if torch is here."""
    if platform.machine() not in ("x86_64", "AMD64") or os.environ.get("VLLM_MOEQ_BUILD_NATIVE") == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return {}

    class OptionalBuild(cpp_extension.BuildExtension):
        """Goes on without the kernel if it does not compile."""

        def run(self) -> None:
            if self.editable_mode:
                return
            try:
                super().run()
            except Exception as error:
                print(f"the CPU kernel is left out, to be compiled when it is needed: {error}", file=sys.stderr)

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    major, minor = torch.__version__.split(".")[:2]
    module = cpp_extension.CppExtension(
        f"{FOLDER.replace('/', '.')}._native_torch{major}_{minor}",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / FOLDER / "csrc").glob("*.cpp")),
        # torch's checks name their file: the folder of the build must not make another library.
        extra_compile_args=[*FLAGS, f"-ffile-prefix-map={ROOT.absolute()}=."],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension())
